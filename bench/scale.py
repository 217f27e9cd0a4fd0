"""Time an epoch and peak memory against the number of images.

    python bench/scale.py                   5 sizes, 5 rounds, about 15 minutes
    python bench/scale.py --quick           2 small sizes, half a minute

Each run is a process of its own: train.py on so many synthetic images of 32 x 32 in colour, kept in
memory; ResNet-9 of width 16, batches of 128, two epochs, of which the second is timed, its validation
included. Linear time: an image takes as long in a large set as in a small one.

The memory that is expected is a sum, over what a process takes that has trained a tiny model (Python,
torch, compiled kernels):
  data        a byte a pixel and channel; of each image the label, its row, its place in the epoch and
              what is drawn for it
  model       weights and buffers
  optimizer   the momentum
  activations the most that is alive at once within a step, gradients included, or within the
              validation of a batch where that is more; as torch's own account of its tensors has it
What is measured beyond it lies in malloc's holes. The ratio is of the whole process, peak over what
is expected; that of the growth alone, which the holes weigh more in, is printed too.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import alternate, arguments, finish, peak_megabytes, ratio, table

SIZES = (4_096, 8_192, 16_384, 32_768, 65_536)
QUICK = (1_024, 4_096)
BATCH, WIDTH, SIDE, CHANNELS, TEST = 128, 16, 32, 3, 128
ASKED = 1.1
SETTINGS = ["data.name=synthetic", "data.augment=[crop, flip]", "model.name=resnet9", "device=cpu"]
SETTINGS += ["train.epochs=2", "log.report=false"]
PARTS = ("data", "model", "optimizer", "activations")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--alone", nargs=2, help=f"for itself: {', '.join(ACTS)}; and how many images"
    )
    args = parser.parse_args()
    if args.alone is not None:
        print(json.dumps(ACTS[args.alone[0]](int(args.alone[1]))), flush=True)
        return
    rounds, sizes = (1, QUICK) if args.quick else (args.rounds, SIZES)
    expected = {number: alone("parts", number) for number in sizes}
    bare = statistics.median(alone("warm", 64)["peak"] for _ in range(rounds))
    measures = {number: lambda number=number: alone("train", number) for number in sizes}
    runs = alternate(measures, rounds, lambda n, run: print(f"{n:>6}  {run['seconds']:.1f} s"))

    def median(number: int, name: str) -> float:
        return statistics.median(run[name] for run in runs[number])

    rows, over, whole = [], {}, {}
    for number in sizes:
        parts = [expected[number][part] for part in PARTS]
        grown = median(number, "peak") - bare
        over[number], whole[number] = grown / sum(parts), (bare + grown) / (bare + sum(parts))
        seconds = median(number, "seconds")
        cells = (*parts, sum(parts), grown)
        ratios = (f"{over[number]:.2f}", f"{whole[number]:.3f}")
        rows.append((f"{number:,}", f"{seconds:.2f}", f"{1e6 * seconds / number:.0f}",
                     *(f"{cell:.1f}" for cell in cells), *ratios))  # fmt: skip
    head = [
        "images",
        "s an epoch",
        "µs an image",
        *PARTS,
        "sum",
        "measured",
        "ratio",
        "whole ratio",
    ]
    print(f"\nmemory in MB, over the {bare:.0f} of a process that has trained a tiny model")
    print(table(head, rows))
    each = {n: [run["seconds"] / n for run in runs[n]] for n in sizes}
    time = ratio(each[sizes[-1]], each[sizes[0]])
    print(f"an image of {sizes[-1]:,} takes {time['median']:.2f} times as long as one of {sizes[0]:,}"
          f" ({time['least']:.2f} to {time['largest']:.2f})")  # fmt: skip
    print(f"peak of the process over what is expected: {max(whole.values()):.3f} at most (asked for:"
          f" {ASKED}); of its growth alone {max(over.values()):.2f} at most")  # fmt: skip
    figures = {"bare": bare, "expected": expected, "runs": runs, "time": time}
    finish(figures | {"over": over, "whole": whole}, args.json)


def alone(act: str, number: int) -> dict[str, Any]:
    """What one of ACTS gives, in a process and a folder of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", act, str(number)]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{act} of {number} images failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- in a process of its own ------------------------------------------------------------------------


def settings(number: int, batch: int = BATCH, width: int = WIDTH) -> list[str]:
    images = f"num_images: {number}, num_test: {TEST}, image_size: {SIDE}, channels: {CHANNELS}"
    more = [f"data.args={{{images}, num_classes: 10}}", f"data.batch_size={batch}"]
    return [*SETTINGS, *more, f"model.args={{width: {width}}}"]


def run_training(number: int, *shape: int) -> dict[str, float]:
    import train

    assert train.main(settings(number, *shape)) == 0
    with open("logs/history.csv", newline="", encoding="utf-8") as file:
        seconds = float(list(csv.DictReader(file))[-1]["seconds"])
    return {"seconds": seconds, "peak": peak_megabytes()}


def warm(number: int) -> dict[str, float]:
    return run_training(number, 8, 4)


def parts(number: int) -> dict[str, float]:
    """Megabytes of what a training is made of; see above."""
    from itertools import chain

    from cnn.config import load_config
    from cnn.datasets.augment import AUGMENTATIONS
    from cnn.training.engine import evaluate, train_one_epoch
    from cnn.training.setup import build_run

    cfg, _ = load_config(None, settings(number))
    run = build_run(cfg)
    state, loader = run.state, run.train_loader
    steps = train_one_epoch(run, loader.train_batches(1))
    for _ in range(2):  # the first makes the momentum
        next(steps)
    step = most_alive(lambda: next(steps))
    largest = [next(run.val_loader.batches())]
    key = {"seed": 0, "epoch": 0}
    metrics = run.evaluation_metrics()
    validation = most_alive(
        lambda: evaluate(state.model, largest, run.loss, run.autocast, metrics, **key)
    )
    of_image = (
        SIDE**2 * CHANNELS + 3 * 8 + 4 * sum(AUGMENTATIONS[name][1] for name in ("crop", "flip"))
    )
    momentum = [value for of in state.optimizer.state.values() for value in of.values()]
    sizes = [(number + TEST) * of_image]
    for tensors in (chain(state.model.parameters(), state.model.buffers()), momentum):
        sizes.append(sum(tensor.nbytes for tensor in tensors))
    sizes.append(max(step, validation))
    return dict(zip(PARTS, (size / 1e6 for size in sizes), strict=True))


def most_alive(act: Callable[[], Any]) -> int:
    """The most bytes in tensors, over those at its beginning."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        most = max(most, alive)
    return most


ACTS = {"train": run_training, "warm": warm, "parts": parts}


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    main()
