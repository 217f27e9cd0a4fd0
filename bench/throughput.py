"""Images a second of a whole training step: ours against the three that people use.

    pip install -r bench/requirements.txt
    python bench/throughput.py --mnist data --cifar photos/cifar10          about 25 minutes
    python bench/throughput.py --mnist data --quick                         about 3

--mnist is the folder above MNIST/raw, --cifar one with train/CLASS/*.jpg and test/CLASS/*.jpg of
32 x 32. Every run is a process of its own (contestants.py): so many steps of 128 images, of which
the first 10 do not count. The peers' default is fp32 and 2 loader workers; tuned is bf16 and
channels_last. Rounds alternate, and ratios are taken within a round: ours over the best peer.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, ratio, table

PEERS = ("plain", "lightning", "trainer")
WAYS = ("default", "tuned")
STEPS = {"mnist": 200, "cifar": 50}
ASKED = {"mnist": (2.4, 1.5), "cifar": (2.1, 1.1)}  # over the best default, the best tuned


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder above MNIST/raw")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    roots = {"mnist": args.mnist, "cifar": args.cifar}
    tasks = {task: path.resolve() for task, path in roots.items() if path is not None}
    if not tasks:
        parser.error("say where data is: --mnist FOLDER, --cifar FOLDER")
    rounds, share = (2, 0.5) if args.quick else (args.rounds, 1.0)
    figures = {}
    for task, root in tasks.items():
        figures[task] = compare(task, root, rounds, int(share * STEPS[task]), args.device)
    finish({"device": args.device, "tasks": figures}, args.json)


def compare(task: str, root: Path, rounds: int, steps: int, device: str) -> dict:
    """All the contestants on one task, round by round."""
    entries = [("ours", "default"), *((peer, way) for way in WAYS for peer in PEERS)]
    measures = {
        entry: lambda entry=entry: measure(*entry, task, root, steps, device) for entry in entries
    }
    measures[entries[0]]()  # once before: what is kept between runs is there then
    results = alternate(measures, rounds, show)
    rates = {entry: [run["images_per_second"] for run in runs] for entry, runs in results.items()}

    def median(entry: tuple[str, str], name: str) -> float:
        return statistics.median(run[name] for run in results[entry])

    print(f"\n{task}: {steps} steps of 128 images, medians of {rounds} rounds")
    rows = [
        (
            " ".join(entry),
            f"{median(entry, 'images_per_second'):,.0f}",
            f"{median(entry, 'seconds_to_first_step'):.2f}",
            f"{median(entry, 'peak_megabytes'):.0f}",
        )
        for entry in entries
    ]
    print(table(["", "images/s", "s to first step", "peak MB"], rows))
    ratios = {}
    for way, asked in zip(WAYS, ASKED[task]):
        best = [max(rates[peer, way][i] for peer in PEERS) for i in range(rounds)]
        ratios[way] = found = ratio(rates[entries[0]], best)
        print(
            f"ours over the best {way}: {found['median']:.2f}"
            f" ({found['least']:.2f} to {found['largest']:.2f}; asked for: {asked})"
        )
    print()
    return {"ratios": ratios, "runs": {" ".join(entry): results[entry] for entry in entries}}


def measure(name: str, way: str, task: str, root: Path, steps: int, device: str) -> dict:
    """One run, from the command to its last step."""
    command = [sys.executable, str(ROOT / "bench" / "contestants.py"), name, task, way]
    command += ["--steps", str(steps), "--root", str(root), "--device", device]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{name} {task} {way} ended early:\n{done.stderr[-2000:]}")
    figures = json.loads(lines[-1])
    figures["seconds_to_first_step"] = figures.pop("first_step") - began
    return figures


def show(entry: tuple[str, str], run: dict) -> None:
    print(f"{' '.join(entry):<18} {run['images_per_second']:>9,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
