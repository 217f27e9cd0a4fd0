"""The environment of a run: its device, precision, versions and code.

The exact bits of the run's results depend on the environment.
"""

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

# If one of these differs, a run is repeated only up to rounding. numpy is among them because
# it shuffles the images and draws their augmentations.
BITS_DEPEND_ON = ("torch", "numpy", "device", "cpu", "threads", "precision", "world_size")


def choose_device(name: str, launch: Launch | None = None) -> torch.device:
    """Chooses the device on which a run computes.

    A CUDA device with an index, such as "cuda:1", becomes PyTorch's current device.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps" or "auto". "auto" is CUDA if available, otherwise MPS,
            otherwise the CPU.
        launch: the place of this process among the processes of the run; None for a run of one
            process. In a run of several processes, each process has a local rank. "auto" and "cuda"
            then give each process the CUDA device with the local rank as index.

    Raises:
        Refused: there is no such device. Refused is also raised if the run has more processes on
            this machine than there are CUDA devices.
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
    """Chooses the precision of the forward passes.

    Args:
        name: "fp32", "bf16", "fp16" or "auto". For a new run, "auto" is "bf16" if the hardware
            supports bf16, and otherwise "fp32". For a resumed run, "auto" is the earlier precision.
        device: the device of the model.
        earlier: the earlier precision of a resumed run; None for a new run.

    Returns:
        "fp32", "bf16" or "fp16".
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
    """Returns a context manager that sets the precision of a forward pass.

    Args:
        device: the device of the model.
        precision: "fp32", "bf16" or "fp16". With "fp32", the context manager has no effect.
    """
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def cpu_has(*features: str) -> bool:
    """Returns whether PyTorch can use at least one of the given CPU features.

    The result is False if PyTorch was built without the library oneDNN. The result is also False on
    a system without the file /proc/cpuinfo, such as Windows.

    Args:
        features: the names of the features as in /proc/cpuinfo, such as "avx512_bf16".
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool(set(features) & set(flags)) and torch.backends.mkldnn.is_available()


def describe(device: torch.device, precision: str, world_size: int = 1) -> dict[str, Any]:
    """Describes the environment of a run for the checkpoint and the log.

    Args:
        device: the device of the model.
        precision: "fp32", "bf16" or "fp16".
        world_size: the number of processes of the run.

    Returns:
        A dict such as {"torch": "2.14.0", "device": "cpu", "threads": 4, "git": "1a2b3c4"}. The
        dict contains package versions, the device, the CPU, the number of threads, `precision`,
        `world_size` and the git commit. An unknown value is None.
    """
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
    """Returns the local time as text, such as "2026-11-20 18:45:01.123456"."""
    return datetime.datetime.now().isoformat(" ")


def git_commit() -> str | None:
    """Returns the git commit of this project's code.

    Returns:
        A text such as "1a2b3c4". If files differ from the commit, a plus sign follows, as in
        "1a2b3c4+". The result is None if the code is not in a git repository or git fails.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    # With optional locks, a git that is killed would leave .git/index.lock behind.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    words = ["describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists changes of the environment that can affect the rounding of results.

    Args:
        then: the environment in a checkpoint, such as {"torch": "2.14.0", "threads": 2}.
        now: the environment of this process, a dict with the same keys.

    Returns:
        A text for each change, such as "threads 2 → 4".
    """
    changed = [key for key in BITS_DEPEND_ON if then.get(key) != now[key]]
    return [f"{key} {then.get(key)} → {now[key]}" for key in changed]


def make_deterministic() -> None:
    """Makes PyTorch use deterministic algorithms only.

    Any later operation without a deterministic algorithm raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
