"""The shipped recipes against the defaults of timm and fastai: test accuracy at equal CPU time.

    pip install -r bench/requirements.txt
    python bench/recipes.py --clothing clothing --cifar cifar10      an hour and a half
    python bench/recipes.py --clothing clothing --quick              some minutes, says nothing

--clothing has train/, validation/ and test/CLASS/*.jpg of photographs; --cifar has CIFAR-10 as
train/CLASS/* and test/CLASS/*, of which 1,000 images train, 300 others of train validate and 2,000
test. Each contestant (recipe_contestants.py) gets as many epochs as fit into the CPU time of its row,
that of the whole command with imports, validation, test and worker processes: two shorter runs say
what an epoch takes. Each computes with one thread, since threads that wait for each other spend CPU
time, too. The order of contestants alternates, seed by seed. Ours begins each run without a
cache, and looks through and decodes all photographs anew.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, table
from bench.recipe_contestants import CONTESTANTS

# Which folder, height and width in pixels, fine-tuned or from scratch, and CPU seconds.
ROWS = {
    "clothing, 64 px, from scratch": ("clothing", 64, False, 120),
    "CIFAR-10, 1,000 images, from scratch": ("cifar", 32, False, 120),
    "clothing, 160 px, fine-tuned": ("clothing", 160, True, 600),
}
# Images of each class: of which folder, from which one on, and how many.
OF_CIFAR = {"train": ("train", 0, 100), "validation": ("train", 100, 30), "test": ("test", 0, 200)}
FEW = {"train": ("train", 0, 25), "validation": ("validation", 0, 3), "test": ("test", 0, 3)}
SHORT_RUNS = (2, 4)  # epochs; fine_tune of fastai needs two
LONGER = 0.4  # of the time, for the second of the two runs, if that is more epochs
MARGIN = 0.95  # of the time, where only a few of the images were timed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clothing", type=Path, metavar="FOLDER")
    parser.add_argument("--cifar", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, help="CPU time of each run, instead of the row's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--row", type=int, choices=range(len(ROWS)), help="only this one")
    args = parser.parse_args()
    names = [name for name in CONTESTANTS if name == "ours" or find_spec(name)]
    figures: dict = {"versions": {name: version(name) for name in names[1:]}}
    with tempfile.TemporaryDirectory() as scratch:
        for row in ROWS if args.row is None else [list(ROWS)[args.row]]:
            which, side, fine_tune, seconds = ROWS[row]
            if (given := getattr(args, which)) is None:
                print(f"skipped: {row}: --{which} FOLDER is needed")
                continue
            seconds, seeds = args.seconds or seconds, args.seeds
            if args.quick:
                given, seconds, seeds = some_of(given, Path(scratch, row), FEW), 30, 1
            elif which == "cifar":
                given = some_of(given, Path(scratch, row), OF_CIFAR)
            figures[row] = compare(row, names, (given, side, fine_tune), seconds, seeds)
    finish(figures, args.json)


def some_of(folder: Path, made: Path, which: dict[str, tuple[str, int, int]]) -> Path:
    """A folder with links to some images of each class."""
    for split, (source, start, number) in which.items():
        for images in sorted((folder / source).iterdir()):
            (made / split / images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[start : start + number]:
                (made / split / images.name / image.name).symlink_to(image.resolve())
    return made


def compare(row: str, names: list[str], task: tuple, seconds: float, seeds: int) -> dict:
    print(f"\n{row}: {seconds:g} CPU seconds, {seeds} seeds", flush=True)
    epochs = {name: epochs_in(seconds, name, task) for name in names}
    print(", ".join(f"{name} {number} epochs" for name, number in epochs.items()), flush=True)
    left = {name: iter(range(seeds)) for name in names}

    def show(name: str, run: dict) -> None:
        print(f"{name}: {json.dumps(run)}", flush=True)

    measures = {
        name: lambda name=name: measure(name, task, epochs[name], next(left[name]))
        for name in names
    }
    runs = alternate(measures, seeds, show)
    rows = [
        [name, epochs[name], *(spread([run[key] for run in runs[name]]) for key in ("val", "test"))]
        + [f"{statistics.mean(run['cpu'] for run in runs[name]):.0f}"]
        for name in names
    ]
    print(table(["", "epochs", "validation %", "test %", "CPU s"], rows), flush=True)
    return {"epochs": epochs, "runs": runs}


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
    return f"{100 * statistics.mean(accuracies):.1f} ± {100 * deviation:.1f}"


def epochs_in(seconds: float, name: str, task: tuple) -> int:
    """How many epochs fit into the time: by two shorter runs, when fine-tuning on a few images."""
    folder, side, fine_tune = task
    with tempfile.TemporaryDirectory() as scratch:
        timed = some_of(folder, Path(scratch), FEW) if fine_tune else folder
        share = len(list(timed.glob("train/*/*"))) / len(list(folder.glob("train/*/*")))
        first, second = SHORT_RUNS
        few = measure(name, (timed, side, fine_tune), first, 0)["cpu"]
        if share == 1:
            second = max(second, int(LONGER * seconds / few * first))
        more = measure(name, (timed, side, fine_tune), second, 0)["cpu"]
    per_epoch = (more - few) / (second - first)
    started = few - first * per_epoch
    left = seconds * (1 if share == 1 else MARGIN) - started
    return max(SHORT_RUNS[0], int(left / (per_epoch / share)))


def measure(name: str, task: tuple, epochs: int, seed: int) -> dict:
    """One run: accuracies, and the CPU time of its process and all processes of that."""
    folder, side, fine_tune = task
    command = [sys.executable, f"{ROOT}/bench/recipe_contestants.py", name, str(folder)]
    command += ["--side", str(side), "--epochs", str(epochs), "--seed", str(seed)]
    command += ["--fine-tune"] if fine_tune else []
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"},
        )
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(said.splitlines()[-1]) | {"cpu": usage.ru_utime + usage.ru_stime}


if __name__ == "__main__":
    main()
