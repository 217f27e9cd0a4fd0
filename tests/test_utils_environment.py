"""What a run runs on: the device that is chosen, and what is written down of the machine."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import pytest
import torch
import torchvision
from conftest import ROOT, TINY
from PIL import Image

from cnn.inference import load
from cnn.utils import environment
from cnn.utils.cpus import usable_cpus


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


V1, V2 = "3:cpuset:/\n4:cpu,cpuacct:/box/job\n0::/\n", "0::/box/job\n"
CPU = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    "cgroup, files, expected",
    [
        (V2, {}, 8),
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "200000 100000\n"}, 2),
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "210000 100000\n"}, 3),
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "1000 100000\n"}, 1),
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "max 100000\n"}, 8),
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "6400000 100000\n"}, 8),
        # that of a parent counts too, and in a container its own cgroup is the top
        (V2, {"sys/fs/cgroup/box/job/cpu.max": "max 1\n", "sys/fs/cgroup/box/cpu.max": "3 1\n"}, 3),
        ("0::/../job\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (V2, {"sys/fs/cgroup/box/other/cpu.max": "1 1\n"}, 8),
        (V1, {f"{CPU}/box/job/cpu.cfs_quota_us": "-1", f"{CPU}/cpu.cfs_period_us": "100000"}, 8),
        (V1, {f"{CPU}/cpu.cfs_quota_us": "150000\n", f"{CPU}/cpu.cfs_period_us": "100000\n"}, 2),
        (
            V1,
            {
                f"{CPU},cpuacct/box/job/cpu.cfs_quota_us": "400000\n",
                f"{CPU},cpuacct/box/job/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        # what cannot be read limits nothing
        (V2, {"sys/fs/cgroup/cpu.max": "2 0\n", "sys/fs/cgroup/box/cpu.max": "\xff"}, 8),
        (V2, {"sys/fs/cgroup/cpu.max": "", "sys/fs/cgroup/box/cpu.max/folder": ""}, 8),
        ("nonsense\n::\n\n", {}, 8),
        (None, {}, 8),
    ],
)
def test_a_quota_of_the_cgroup_or_of_one_above_it_limits_the_cpus(
    monkeypatch, cgroup, files, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        if text is not None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="latin-1")
    assert usable_cpus(Path.cwd()) == expected


def test_images_are_decoded_on_the_cpus_that_the_process_may_use(monkeypatch, train):
    """A cluster's job on one core of 128 would start 128 threads, each with an image in memory."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    asked = []
    pool = ThreadPoolExecutor.__init__
    monkeypatch.setattr(
        ThreadPoolExecutor,
        "__init__",
        lambda self, number=None, name="": (name or asked.append(number), pool(self, number, name))[
            1
        ],
    )
    for name in "abcdef":
        Path("photos", "xy"[name < "d"]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), ord(name)).save(f"photos/{'xy'[name < 'd']}/{name}.png")
    data = ["data.name=folder", "data.root=photos", "data.args={image_size: 8}", "train.epochs=1"]
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert train(*data, "data.in_memory=true", "data.val_fraction=0.4") == 0
        load("checkpoints/last.pth")(["photos/x/d.png", "photos/x/e.png"])
    finally:
        os.sched_setaffinity(0, before)
    assert asked == [1, 1], "threads that read the images and predict"
