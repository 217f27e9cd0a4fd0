"""Accuracy in bf16 against fp32: is there a difference beyond what another seed makes?

    python bench/precision.py --mnist data       5 seeds each of digits and MNIST, about 12 minutes
    python bench/precision.py --quick            3 seeds of digits, half a minute

Whole runs of train.py in scratch folders: digits with the settings that come with the project, MNIST
with configs/mnist.yaml for --epochs epochs, warm-up and fall of the learning rate within these. What
counts is the accuracy on the test set of the epoch that validation chose. --mnist is the folder above
MNIST/raw. The seeds' spread is from the least to the largest accuracy of one precision, the wider of
the two; the standard error is that of the difference of the means.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, table, train

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder above MNIST/raw")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="of MNIST")
    args = parser.parse_args()
    seeds = 3 if args.quick else args.seeds
    sets: dict[str, list[str]] = {"digits": []}
    if args.mnist is not None and not args.quick:
        recipe = ["--config", str(ROOT / "configs/mnist.yaml"), f"data.root={args.mnist.resolve()}"]
        warm_up = f"schedule.warmup_epochs={args.epochs / 6:.3f}"  # the recipe's share: 1 of 6
        sets["mnist"] = [*recipe, f"train.epochs={args.epochs}", warm_up]
    figures = {name: compare(name, settings, seeds) for name, settings in sets.items()}
    finish({"sets": figures}, args.json)


def compare(name: str, settings: list[str], seeds: int) -> dict:
    """Both precisions with the same seeds, in turn."""
    measures = {
        (precision, seed): lambda precision=precision, seed=seed: train(
            *settings, f"train.precision={precision}", f"seed={seed}"
        )[-1]["test_acc"]
        for seed in range(seeds)
        for precision in PRECISIONS
    }
    found = alternate(measures, 1)
    accuracies = {p: [found[p, seed][0] for seed in range(seeds)] for p in PRECISIONS}
    means = {p: statistics.mean(values) for p, values in accuracies.items()}
    spread = max(max(values) - min(values) for values in accuracies.values())
    error = math.sqrt(sum(statistics.variance(a) for a in accuracies.values()) / seeds)
    rows = [
        (p, *(f"{100 * x:.2f}" for x in (*values, means[p], min(values), max(values))))
        for p, values in accuracies.items()
    ]
    head = ["", *(f"seed {seed}" for seed in range(seeds)), "mean", "least", "largest"]
    print(f"\n{name}, test accuracy in %\n" + table(head, rows))
    difference = means["bf16"] - means["fp32"]
    inside = abs(difference) <= spread
    print(f"bf16 - fp32: {100 * difference:+.2f} points (standard error {100 * error:.2f}),"
          f" {'within' if inside else 'BEYOND'} the seeds' spread of {100 * spread:.2f}", flush=True)  # fmt: skip
    return {"accuracies": accuracies, "difference": difference, "spread": spread, "within": inside}


if __name__ == "__main__":
    main()
