"""What a run runs on: the device that is chosen, and what is written down of the machine."""

import subprocess
import sys

import PIL
import pytest
import torch
import torchvision
from conftest import ROOT

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


def test_describing_the_machine_imports_no_torchvision():
    code = (
        "import sys, torch; from cnn.utils import environment;"
        "environment.describe(torch.device('cpu'), 'fp32'); print('torchvision' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_another_numpy_is_told_as_what_bits_depend_on():
    now = environment.describe(torch.device("cpu"), "fp32")
    then = now | {"numpy": "1.26.0"}
    assert environment.differences(then, now) == [f"numpy 1.26.0 → {now['numpy']}"]
