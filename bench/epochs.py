"""Is a later epoch slower than the first, and does memory grow from epoch to epoch?

    python bench/epochs.py --mnist data          about 3 minutes
    python bench/epochs.py --quick               digits alone, a quarter of a minute

Each run is one of train.py in a scratch folder. Of runs of three epochs the second's seconds are
divided by the first's, validation included; the noise is what the third's over the second's show,
between which nothing is different. Of a run of 50 epochs of digits, the memory that the process holds
(its resident set, from outside) is taken after each epoch. --mnist is the folder above MNIST/raw.
"""

import os
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, table, train

EPOCHS = 50
ASKED = 0.01  # the history itself takes some KB an epoch
SHOWN = (1, 2, 5, 10, 20, 35, 50)
SETTINGS = {
    "digits": [],
    "mnist": ["--config", str(ROOT / "configs/mnist.yaml"), "model.name=lenet5"],
}
SETTINGS["mnist"] += ["model.args={dropout: 0.25}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder above MNIST/raw")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    runs = 3 if args.quick else args.runs
    sets = {"digits": SETTINGS["digits"]}
    if args.mnist is not None and not args.quick:
        sets["mnist"] = [*SETTINGS["mnist"], f"data.root={args.mnist.resolve()}"]
    measures = {
        name: lambda settings=settings: [
            row["seconds"] for row in train(*settings, "train.epochs=3")[:-1]
        ]
        for name, settings in sets.items()
    }
    seconds = alternate(measures, runs)
    figures = {name: compare(name, seconds[name]) for name in sets}
    finish(
        {"seconds": seconds, "ratios": figures} | watch_memory(1 if args.quick else 3), args.json
    )


def compare(name: str, runs: list[list[float]]) -> dict[str, list[float]]:
    """The second epoch over the first, beside the third over the second."""
    found = {"2 / 1": [run[1] / run[0] for run in runs], "3 / 2": [run[2] / run[1] for run in runs]}
    rows = [(f"epoch {which}", *(f"{x:.3f}" for x in (min(r), statistics.median(r), max(r))))
            for which, r in found.items()]  # fmt: skip
    print(f"\n{name}: {len(runs)} runs; seconds of their epochs "
          + ", ".join(f"{statistics.median(times):.3f}" for times in zip(*runs)))  # fmt: skip
    print(table(["", "least", "median", "largest"], rows))
    noise = max(abs(ratio - 1) for ratio in found["3 / 2"])
    over = statistics.median(found["2 / 1"]) - 1
    print(f"the second is {'slower' if over > noise else 'not slower'} than the first by more than"
          f" noise ({over:+.1%}, noise {noise:.1%})")  # fmt: skip
    return found


def watch_memory(runs: int) -> dict[str, list[list[float]]]:
    """Megabytes after each of many epochs, run by run."""
    if not Path("/proc/self/statm").exists():
        print("\nmemory: taken from /proc, which there is none of here")
        return {}
    series = []
    for _ in range(runs):
        taken: list[float] = []

        def look(process: int, line: str, taken: list[float] = taken) -> None:
            if re.match(rf"epoch \d+/{EPOCHS}  train loss", line):
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                taken.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

        train(f"train.epochs={EPOCHS}", watch=look)
        assert len(taken) == EPOCHS, f"{len(taken)} epochs told of"
        series.append(taken)
    rows = [(f"run {number}", *(f"{taken[epoch - 1]:.1f}" for epoch in SHOWN))
            for number, taken in enumerate(series, 1)]  # fmt: skip
    print(f"\nMB that the process holds after so many epochs of digits, of {EPOCHS}")
    print(table(["", *SHOWN], rows))
    grown = [taken[-1] / taken[4] - 1 for taken in series]
    print(f"from epoch 5 to {EPOCHS}: {statistics.median(grown):+.2%} ({min(grown):+.2%} to"
          f" {max(grown):+.2%}; asked for: none, which is less than {ASKED:.0%})")  # fmt: skip
    return {"megabytes": series}


if __name__ == "__main__":
    main()
