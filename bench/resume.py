"""Does a resume late in an epoch start as fast as an early one? Nothing before it is read again.

    python bench/resume.py [--quick]

One long epoch of a synthetic set is stopped after 10 steps and after 1,750 of 1,800; each of the
two is then resumed in turn, and the time from the command to the first step is taken.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 64_000, 32  # 1,800 steps an epoch, after validation is held out
STEPS = (10, 1_750)
SETTINGS = [
    "data.name=synthetic",
    f"data.args={{num_images: {IMAGES}, image_size: 8}}",
    f"data.batch_size={BATCH}",
    "data.augment=[crop]",
    "model.args={width: 4}",
    "train.epochs=1",
    "checkpoint.every_minutes=null",
    "log.every_seconds=0.001",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    times: dict[int, list[float]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for step in times:
            stop_at(step)
        for _ in range(2 if args.quick else 7):
            for step, seconds in times.items():
                seconds.append(seconds_to_next_step(step))
    for step, seconds in times.items():
        print(
            f"step {step:5}: {statistics.median(seconds):.2f} s from the command to the next step"
        )
    pairs = [late / early for early, late in zip(*times.values())]
    print(
        f"ratio late/early, median of {len(pairs)} pairs: {statistics.median(pairs):.3f}"
        f" ({min(pairs):.3f} to {max(pairs):.3f})"
    )


def stop_at(step: int) -> None:
    """Leaves a checkpoint of that step in checkpoints/at_STEP/."""
    process = start(*SETTINGS, f"run=at_{step}", f"checkpoint.every_steps={step}")
    while not Path(f"checkpoints/at_{step}/last.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()


def seconds_to_next_step(step: int) -> float:
    """Seconds from the command that resumes to the first step that it tells of."""
    shutil.rmtree("checkpoints/again", ignore_errors=True)
    shutil.copytree(f"checkpoints/at_{step}", "checkpoints/again")
    began = time.perf_counter()
    process = start("--resume", "checkpoints/again/last.pth", "run=again")
    for line in process.stderr:
        if line.startswith("epoch 1/1  "):
            seconds = time.perf_counter() - began
            assert int(line.split()[2].split("/")[0]) >= step, line
            process.kill()
            process.communicate()
            return seconds
    raise SystemExit("the resumed run ended before a step")


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words], stderr=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    main()
