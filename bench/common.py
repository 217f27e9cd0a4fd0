"""What the benchmarks share: alternating measurements, a table, a JSON file that says where and when."""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of the time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def alternate(
    measures: dict[Hashable, Callable[[], Any]], rounds: int, show: Callable | None = None
) -> dict[Hashable, list[Any]]:
    """What each measure gave in each round; in every second round they come the other way round.

    The machine may be shared, and slow for a minute: what was measured side by side compares.
    """
    results: dict[Hashable, list[Any]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(measures[name]())
            if show is not None:
                show(name, results[name][-1])
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the ratios round by round."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def train(
    *settings: str, watch: Callable[[int, str], None] | None = None
) -> list[dict[str, float]]:
    """Runs train.py in a scratch folder; gives its history, then what it says of the test.

    Args:
        watch: is called with the process's number and each line of the log, while it runs.
    """
    command = [sys.executable, str(ROOT / "train.py"), *settings, "log.report=false"]
    said = []
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(command, cwd=scratch, stderr=subprocess.PIPE, text=True)
        with process:
            for line in process.stderr:
                said.append(line)
                if watch is not None:
                    watch(process.pid, line)
        if process.returncode != 0:
            raise SystemExit(f"{shlex.join(command)} failed:\n{''.join(said[-20:])}")
        with open(f"{scratch}/logs/history.csv", newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        return [*rows, json.loads(Path(scratch, "logs/result.json").read_bytes())["test"]]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in columns, the first to the left, the others to the right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    )


def finish(figures: dict[str, Any], file: Path | None) -> None:
    """Writes the figures with date, machine and command, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(about() | figures, indent=1) + "\n", encoding="utf-8")


def about() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "date": datetime.datetime.now().isoformat(" ", "seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # what others did, at the end
        "torch": version("torch"),
        "python": platform.python_version(),
    }  # fmt: skip


def cpu() -> str:
    """The processor's name, with those of its features that decide about bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    flags = text.partition("flags")[2].partition("\n")[0].split()
    return " ".join([name, *(flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags)])


def peak_megabytes() -> float:
    """The largest resident set that this process has had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
