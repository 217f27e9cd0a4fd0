"""What a run runs on: device, precision, versions, code; what its bits depend on."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from cnn.errors import Refused
from cnn.utils.launch import ALONE, Launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Where one of these differs, a run repeats itself only up to rounding.
# numpy: it orders the images and draws what is random about them.
BITS_DEPEND_ON = ("torch", "numpy", "device", "cpu", "threads", "precision", "world_size")


def choose_device(name: str, launch: Launch = ALONE) -> torch.device:
    """The device of that name, made the current one; auto is CUDA, else MPS, else the CPU.

    Args:
        launch: of several processes on a machine, each has the CUDA device of its number.
    """
    if launch.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        if launch.local_size > torch.cuda.device_count():
            raise Refused(
                f"device: torchrun has started {launch.local_size} processes here, and there are"
                f" {torch.cuda.device_count()} CUDA devices; --nproc-per-node says how many"
            )
        name = f"cuda:{launch.local_rank}"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        found = torch.cuda.device_count()
        raise Refused(f"device: {name} is not available here ({found} CUDA devices); try auto")
    if device.index is not None:
        torch.cuda.set_device(device)  # the one whose generator torch.cuda.manual_seed keys
    return device


def choose_precision(name: str, device: torch.device, earlier: str | None = None) -> str:
    """fp32, bf16 or fp16; auto is bf16 where the hardware computes in it, else fp32.

    Args:
        earlier: the run's precision before a resume, which auto keeps.
    """
    if name != "auto":
        return name
    if earlier in DTYPES:
        return earlier
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu" and cpu_has("avx512_bf16", "amx_bf16"):
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass has that precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def cpu_has(*features: str) -> bool:
    """Whether the CPU has one of these, as Linux names them, and torch uses oneDNN, which does."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool(set(features) & set(flags)) and torch.backends.mkldnn.is_available()


def describe(device: torch.device, precision: str, world_size: int = 1) -> dict[str, Any]:
    """Versions, hardware and code, as plain values for checkpoint and log."""
    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "torchvision": _version("torchvision"),
        "pillow": _version("pillow"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "world_size": world_size,
        "git": git_commit(),
    }


def _version(package: str) -> str | None:
    """The installed version, without the seconds that importing may take."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def timestamp() -> str:
    """Now, as 2026-11-20 18:45:01.123456; what one run is told from another by."""
    return datetime.datetime.now().isoformat(" ")


def git_commit() -> str | None:
    """The commit of this code, with '+' where files were changed since; None outside git."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    # Without optional locks: killed in the middle, git would leave .git/index.lock behind.
    done = subprocess.run(
        ["git", "--no-optional-locks", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=5,
        check=True,
    )
    return done.stdout.strip()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What bits depend on and is not as it was, each as 'threads 2 → 4'."""
    return [
        f"{key} {then.get(key)} → {now[key]}" for key in BITS_DEPEND_ON if then.get(key) != now[key]
    ]


def make_deterministic() -> None:
    """Sets what PyTorch's notes on reproducibility ask for on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
