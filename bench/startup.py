"""How long from the command to the first step, against a bare `import torch`.

    python bench/startup.py                11 pairs, about a minute
    python bench/startup.py --imports      also what is imported and how long it takes

Runs the configuration that comes with the project, the digits. Pairs alternate.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, ratio, table

ASKED = 1.3
TRAIN = [str(ROOT / "train.py"), "log.every_seconds=1e-6"]  # tells of the first step at once
LISTED = 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--imports", action="store_true", help="list the largest imports")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measures = {
            "first step": lambda: seconds_to_first_step(scratch),
            "import torch": lambda: seconds_to_end("import torch", scratch),
        }
        for measure in measures.values():
            measure()  # once before: files come from the disk
        times = alternate(measures, 3 if args.quick else args.pairs)
        if args.imports:
            print_imports(scratch)
    found = ratio(times["first step"], times["import torch"])
    rows = [(name, *(f"{s:.2f}" for s in (min(t), sorted(t)[len(t) // 2], max(t)))) for name, t in times.items()]  # fmt: skip
    print(table(["seconds", "least", "median", "largest"], rows))
    print(
        f"ratio: {found['median']:.3f} ({found['least']:.3f} to {found['largest']:.3f};"
        f" asked for: {ASKED} at most)"
    )
    finish({"seconds": times, "ratio": found}, args.json)


def seconds_to_first_step(folder: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, *TRAIN]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if re.match(r"epoch 1/\d+  1/", line):
            seconds = time.perf_counter() - began
            process.kill()
            process.communicate()
            return seconds
    raise SystemExit("the run ended before a step")


def seconds_to_end(code: str, folder: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return time.perf_counter() - began


def print_imports(folder: str) -> None:
    """The modules that take longest with what they import, of a run of one epoch."""
    command = [sys.executable, "-X", "importtime", *TRAIN, "train.epochs=1", "log.report=false"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.findall(r"import time: +(\d+) \| +(\d+) \| ( *)(\S+)", done.stderr)
    found.sort(key=lambda row: -int(row[1]))
    rows = [(name, f"{int(whole) / 1e3:.0f}") for _, whole, _, name in found[:LISTED]]
    print(table(["module", "ms"], rows) + "\n")


if __name__ == "__main__":
    main()
