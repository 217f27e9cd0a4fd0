"""What a run runs on: the device that is chosen, and what is written down of the machine."""

import os
import subprocess
import sys

import PIL
import pytest
import torch
import torchvision
from conftest import ROOT, TINY

from cnn.utils import environment


@pytest.mark.parametrize("name, chosen", [("cuda:1", [1]), ("cuda", [])])
def test_a_gpu_asked_for_by_number_is_the_one_that_seeds_are_for(monkeypatch, name, chosen):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    assert environment.choose_device(name) == torch.device(name)
    assert current == chosen


def test_the_cpu_makes_no_gpu_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("set"))
    assert environment.choose_device("cpu") == torch.device("cpu")


def test_the_versions_of_what_decodes_and_changes_images_are_recorded():
    then = environment.describe(torch.device("cpu"), "fp32")
    assert (
        torchvision.__version__.startswith(then["torchvision"])
        and then["pillow"] == PIL.__version__
    )


def test_a_run_imports_nothing_large_but_torch():
    """Each of these takes between a tenth of a second and as long as torch itself."""
    code = (
        "import gc, sys, train; done = train.main(sys.argv[1:]); assert gc.isenabled();"
        "large = ('torch._dynamo', 'torch._inductor', 'torchvision', 'triton', 'sympy',"
        " 'matplotlib', 'tensorboard');"
        "print(done, [name for name in large if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *TINY, "train.epochs=1", "data.augment=[]"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_another_numpy_is_told_as_what_bits_depend_on():
    now = environment.describe(torch.device("cpu"), "fp32")
    then = now | {"numpy": "1.26.0"}
    assert environment.environment_changes(then, now) == [f"numpy 1.26.0 → {now['numpy']}"]
