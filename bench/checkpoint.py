"""What saving costs: the share of training time lost when last.pth is written every 30 seconds.

    python bench/checkpoint.py             40 pairs of 2 s, about 4 minutes
    python bench/checkpoint.py --quick     5 pairs

Trains torchvision's resnet18 on synthetic 32 x 32 images through the project's own step and saver.
Stretches of the same number of steps alternate, one with a save in it, one without, no longer than
the write takes and a little: what a save costs is then the larger part of the difference, and not
lost in the machine's own noise. The ratio is taken pair by pair, and the median is reported.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cnn.config import load_config
from cnn.training.engine import train_one_epoch
from cnn.training.saver import Saver
from cnn.training.setup import build_run
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import StopSignals

SETTINGS = [
    "data.name=synthetic",
    "data.args={num_images: 4096, image_size: 32, channels: 3, num_classes: 10}",
    "data.batch_size=128",
    "model.name=resnet18",
    "checkpoint.every_minutes=null",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a stretch")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    pairs = 5 if args.quick else args.pairs

    cfg, _ = load_config(None, SETTINGS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        RunFolder(None, Path(scratch)) as folder,
        Saver(run := build_run(cfg, folder), StopSignals()) as saver,
    ):
        steps = endless_steps(run)
        timed(steps, 10)  # warm-up
        step_seconds = timed(steps, 10) / 10
        number = max(10, round(args.seconds / step_seconds))
        ratios, blocked = [], []
        for pair in range(pairs):
            times = {}
            for saving in (True, False) if pair % 2 else (False, True):
                began = time.perf_counter()
                if saving:
                    saver.save()
                    blocked.append(time.perf_counter() - began)
                timed(steps, number)
                saver.writer.wait()
                times[saving] = time.perf_counter() - began
            ratios.append(times[True] / times[False])
            print(f"pair {pair + 1}: {times[True]:.2f} s with a save, {times[False]:.2f} s without")
        megabytes = folder.last.stat().st_size / 1e6

    lost = statistics.median(ratios) - 1
    cost = lost * number * step_seconds
    figures = {
        "model": "resnet18",
        "megabytes": megabytes,
        "stretch_seconds": number * step_seconds,
        "ratio_median": lost + 1,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "blocked_milliseconds": 1e3 * statistics.median(blocked),
        "lost_every_30_s": cost / 30,
        "lost_every_5_min": cost / 300,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    print(
        f"checkpoint of {megabytes:.0f} MB; training stands still for {figures['blocked_milliseconds']:.0f} ms"
    )
    print(f"a stretch of {number * step_seconds:.1f} s with one save / without: {lost + 1:.4f}"
          f" ({min(ratios):.4f} to {max(ratios):.4f})")  # fmt: skip
    print(
        f"share of time lost: {cost / 30:.2%} saving every 30 s, {cost / 300:.3%} every 5 minutes"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def endless_steps(run):
    while True:
        yield from train_one_epoch(run, run.train_batches())
        run.state.batch = 0


def timed(steps, number: int) -> float:
    began = time.perf_counter()
    for _ in range(number):
        next(steps)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
