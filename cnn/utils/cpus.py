"""The number of CPUs that the process may use, which a container or a job can limit."""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Returns the number of CPUs that this process may use, at least 1.

    The affinity of the process and the CPU quotas of the process's cgroups limit the number. A
    quota is rounded up to whole CPUs. A quota that cannot be read is ignored.

    Args:
        root: the folder that contains proc/ and sys/.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS and Windows have none
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for folder in _cgroups(root):
        # CPU time per period and the period, in microseconds, of version 2 or 1
        text = _read(folder, "cpu.max") or _read(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us")
        # No limit is written as "max" or as -1.
        numbers = [int(word) for word in text.split() if word.isdecimal()]
        if len(numbers) == 2 and all(numbers):
            cpus = min(cpus, -(-numbers[0] // numbers[1]))
    return cpus


def _cgroups(root: Path) -> Iterator[Path]:
    """Yields the folders of this process's cgroups that limit CPUs, and all parent folders.

    A container can see its own cgroup as the top folder, under a name from outside of the
    container. So not every folder exists.
    """
    # A line is such as "0::/job" in version 2, and "4:cpu,cpuacct:/job" in version 1.
    for line in _read(root, "proc/self/cgroup").splitlines():
        controllers, _, name = line.partition(":")[2].partition(":")
        if not controllers or "cpu" in controllers.split(","):
            for mount in {controllers, controllers and "cpu"}:
                folder = root / "sys/fs/cgroup" / mount / name.lstrip("/")
                yield from (folder, *folder.parents)


def _read(folder: Path, *names: str) -> str:
    try:
        return " ".join((folder / name).read_text() for name in names)
    except (OSError, ValueError):  # ValueError: the bytes are not text
        return ""
