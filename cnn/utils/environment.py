"""The environment of a run: device, precision, versions and code, on which its bits depend."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import distributions  # importing torchvision takes a second
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch

from cnn.errors import Refused
from cnn.utils.launch import Launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Where one of these differs, a run repeats itself only up to rounding. numpy is among them because
# it shuffles the images and draws their augmentations.
BITS_DEPEND_ON = ("torch", "numpy", "device", "cpu", "threads", "precision", "world_size")


def choose_device(name: str, launch: Launch | None = None) -> torch.device:
    """Finds the device of that name and makes it the current one.

    Args:
        name: "auto" is CUDA, else MPS, else the CPU.
        launch: with several processes, each takes the CUDA device of its local rank.

    Raises:
        Refused: there is no such device, or there are more processes than CUDA devices.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch and launch.size > 1 and name in ("auto", "cuda") and num_gpus:
        if launch.local_size > num_gpus:
            fault = f"{launch.local_size} processes of torchrun here, but {num_gpus} CUDA devices"
            raise Refused(f"device: {fault}; --nproc-per-node sets how many")
        name = f"cuda:{launch.local_rank}"
    num_devices = {"cuda": num_gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, number in num_devices.items() if number)
    device = torch.device(name)
    if (device.index or 0) >= num_devices[device.type]:
        raise Refused(f"device: {name} is not available here ({num_gpus} CUDA devices); try auto")
    if device.index is not None:
        torch.cuda.set_device(device)  # torch.cuda.manual_seed seeds the current device
    return device


def choose_precision(name: str, device: torch.device, earlier: str | None = None) -> str:
    """Returns fp32, bf16 or fp16.

    Args:
        name: one of these, or "auto": bf16 where the hardware computes in it, else fp32.
        earlier: the precision before a resume, which "auto" keeps.
    """
    if name != "auto":
        return name
    if earlier in DTYPES:
        return earlier
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = device.type == "cpu" and cpu_has("avx512_bf16", "amx_bf16")
    return "bf16" if has_bf16 else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context in which a forward pass computes in that precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def cpu_has(*features: str) -> bool:
    """Returns whether the CPU has one of these features of Linux's list, and torch has oneDNN."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool(set(features) & set(flags)) and torch.backends.mkldnn.is_available()


def describe(device: torch.device, precision: str, world_size: int = 1) -> dict[str, Any]:
    """Returns versions, hardware and commit as plain values, for checkpoint and log."""
    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "torchvision": next((d.version for d in distributions(name="torchvision")), None),
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "world_size": world_size,
        "git": git_commit(),
    }


def timestamp() -> str:
    """Returns the time as 2026-11-20 18:45:01.123456, by which runs are distinguished."""
    return datetime.datetime.now().isoformat(" ")


def git_commit() -> str | None:
    """Returns the commit of this code, with '+' where files differ from it; None outside git."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    # Without optional locks: killed in the middle, git would leave .git/index.lock behind.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    words = ["describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what bits depend on and has changed, each as 'threads 2 → 4'."""
    return [
        f"{key} {then.get(key)} → {now[key]}" for key in BITS_DEPEND_ON if then.get(key) != now[key]
    ]


def make_deterministic() -> None:
    """Makes PyTorch deterministic on CUDA, as its notes on reproducibility describe."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
