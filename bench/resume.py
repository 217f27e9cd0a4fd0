"""Does a resume late in an epoch start as fast as an early one? Nothing before it is read again.

    python bench/resume.py [--quick]

One long epoch of a synthetic set is stopped after 10 steps and shortly before its end; each of the
two is then resumed in turn, and the time from the command to the first step is taken.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 64_000, 32  # 1,800 steps an epoch, after validation is held out
SETTINGS = [
    "data.name=synthetic",
    f"data.args={{num_images: {IMAGES}, image_size: 8}}",
    f"data.batch_size={BATCH}",
    "data.augment=[crop]",
    "model.args={width: 4}",
    "train.epochs=1",
    "log.every_seconds=0.001",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    last_step = int(IMAGES * 0.9) // BATCH - 1
    times: dict[int, list[float]] = {10: [], last_step: []}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for step in times:
            train(*SETTINGS, f"run=at_{step}", f"checkpoint.every_steps={step}", until=step)
        for _ in range(2 if args.quick else 7):
            for step in times:
                shutil.rmtree("checkpoints/again", ignore_errors=True)
                shutil.copytree(f"checkpoints/at_{step}", "checkpoints/again")
                words = ["--resume", "checkpoints/again/last.pth", "run=again"]
                times[step].append(train(*words, until=step + 1))
    for step, seconds in times.items():
        print(
            f"step {step:5}: {statistics.median(seconds):.2f} s from the command to the next step"
        )
    pairs = [late / early for early, late in zip(*times.values())]
    print(f"ratio late/early, median of {len(pairs)} pairs: {statistics.median(pairs):.3f}"
          f" ({min(pairs):.3f} to {max(pairs):.3f})")  # fmt: skip


def train(*words: str, until: int) -> float:
    """Seconds until the log tells of that step; then the run is stopped (it saves)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words], stderr=subprocess.PIPE, text=True
    )
    seconds = None
    for line in process.stderr:
        told = [word for word in line.split() if "/" in word and word[0].isdigit()]
        if line.startswith("epoch") and len(told) > 1 and int(told[1].split("/")[0]) >= until:
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGKILL if "--resume" in words else signal.SIGTERM)
            break
    process.communicate()
    assert seconds is not None, "the run ended before that step"
    return seconds


if __name__ == "__main__":
    main()
