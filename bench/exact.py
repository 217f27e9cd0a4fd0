"""Does a run that is killed and resumed end with the same bits as one that never was?

    pip install -r bench/requirements.txt
    python bench/exact.py                           ours and nine peers, some ten minutes
    python bench/exact.py --quick                   ours and the plain loop
    python bench/exact.py --only lightning trainer
    python bench/exact.py --figure docs/exact.png   only the picture, of ours and Lightning

Each contestant (exact_contestants.py) trains a small CNN for four epochs of 16 steps: shuffled
images, random crops and flips in two loader workers, dropout, momentum, a schedule; fp32 on the
CPU, one thread. Every run is a process of its own, and is killed by SIGKILL with its workers: once
early in epoch 3, where the newest checkpoint is the one of the end of epoch 2, and once inside
epoch 3 with a checkpoint of its 8th step. The same command resumes it. The SHA-256 of the final
weights and the loss of every step are compared with those of an unbroken run. The two unbroken
runs, which save as the two killed ones do, must equal each other: else nothing can be said.
"""

import concurrent.futures
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import exact_contestants as task
from bench.common import ROOT, about, arguments, finish, table

# What each is called, and the packages that it needs.
CONTESTANTS: dict[str, tuple[str, ...]] = {
    "ours": ("ours",),
    "plain": ("pytorch/examples, imagenet",),
    "lightning": ("Lightning", "lightning"),
    "lightning-stateful": ("Lightning + StatefulDataLoader", "lightning", "torchdata"),
    "trainer": ("Hugging Face Trainer", "transformers", "accelerate"),
    "accelerate": ("Accelerate", "accelerate"),
    "accelerate-seedable": ("Accelerate, seedable sampler", "accelerate"),
    "accelerate-stateful": ("Accelerate, stateful loader", "accelerate", "torchdata"),
    "ignite": ("Ignite Engine", "pytorch-ignite"),
    "ignite-deterministic": ("Ignite DeterministicEngine", "pytorch-ignite"),
}
EPOCHS = 4
STOPS = {"epoch": 35, "steps": 45}  # resumed after step 32, an epoch's end, and after step 40
FIGURE_EPOCHS = 6
FIGURE_STOPS = (15, 28, 43, 58, 76)  # resumed after steps 10, 20, 40, 50, 70
LIGHT = {"color": "#f2a65a", "lw": 6, "label": "never stopped"}
DARK = {"color": "#10243e", "lw": 1.6, "label": "killed and resumed"}
OURS = [
    "data.name=bench.exact_contestants:load",
    "data.in_memory=false",  # else no loader worker would be needed
    f"data.num_workers={task.WORKERS}",
    f"data.batch_size={task.BATCH}",
    f"data.augment=[{{name: crop, padding: {task.PADDING}}}, flip]",
    f"model.args={{width: {task.WIDTH}, dropout: {task.DROPOUT}}}",
    "loss.name=bench.exact_contestants:RecordedLoss",
    f"optim.lr={task.LR}",
    f"optim.momentum={task.MOMENTUM}",
    "optim.weight_decay=0",
    "schedule.name=step",
    "schedule.warmup_epochs=0",
    f"schedule.step_epochs={task.DROP_EPOCHS}",
    f"schedule.gamma={task.GAMMA}",
    "checkpoint.every_minutes=null",
    "train.precision=fp32",
    "loss.label_smoothing=0",
    "log.report=false",
    "device=cpu",
]


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        weights: the SHA-256 of the final weights.
        losses: the loss of each step. A step that was taken again counts as it was taken last.
        images: the indices of the images of each step; empty lists for ours.
        resumed_at: the first step of each process but the first.
    """

    weights: str
    losses: dict[int, float]
    images: dict[int, list[int]]
    resumed_at: list[int]

    def differing(self, other: "Run") -> int:
        """Returns the number of steps whose losses are not the same bits."""
        return sum(self.losses.get(step) != loss for step, loss in other.losses.items())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="only draw the picture")
    args = parser.parse_args()
    if args.figure is not None:
        finish({"steps that differ": draw(args.figure)}, args.json)
        return
    names = args.only or (["ours", "plain"] if args.quick else list(CONTESTANTS))
    with concurrent.futures.ThreadPoolExecutor(about()["cores"]) as pool:
        results = dict(zip(names, pool.map(compare, names)))
    head = ["", "repeats itself", "from an epoch's end", "from inside an epoch"]
    head += ["resumed at step", "losses that differ", "images twice, never"]
    facts = about()
    print(f"{facts['date']}, {facts['cpu']}, torch {facts['torch']}\n")
    print(table(head, [row(name, results[name]) for name in names]))
    print(f"\nsteps and losses (of {EPOCHS * task.STEPS}): from an epoch's end / from inside one;")
    print("images: in the epoch that was resumed inside, where the weights differ")
    finish({"contestants": results}, args.json)


def label(name: str) -> str:
    """Returns a contestant's title with the versions of its packages.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    title, *packages = CONTESTANTS[name]
    return " ".join([title, "/".join(map(version, packages))]).strip()


def row(name: str, result: dict | str) -> list[str]:
    """Returns a contestant's row of the table."""
    if isinstance(result, str):
        return [f"{CONTESTANTS[name][0]}: {result}", *6 * ["-"]]
    yes = {True: "yes", False: "no"}
    steps, losses = (
        " / ".join(str(result[saves][key]) for saves in STOPS) for key in ("resumed_at", "losses")
    )
    images = "" if result["steps"]["same"] else "{}, {}".format(*result["steps"]["images"])
    same = [yes[result[saves]["same"]] for saves in STOPS]
    return [label(name), yes[result["repeats"]], *same, steps, losses, images]


def compare(name: str) -> dict | str:
    """Returns what differs between the runs of a contestant, or why there are none."""
    try:
        label(name)
        result = compare_runs(name)
    except PackageNotFoundError:
        result = "not installed"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        result = "failed"
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def compare_runs(name: str) -> dict:
    """Runs a contestant without a stop and killed, with both kinds of checkpoints, and compares."""
    unbroken = {saves: complete(name, saves) for saves in STOPS}
    result: dict = {"repeats": unbroken["epoch"] == unbroken["steps"]}
    for saves, stop in STOPS.items():
        resumed = complete(name, saves, (stop,))
        first = (stop - 1) // task.STEPS * task.STEPS + 1  # of the epoch
        seen = Counter(
            image
            for step in range(first, first + task.STEPS)
            for image in resumed.images.get(step, [])
        )
        result[saves] = {
            "same": resumed.weights == unbroken[saves].weights,
            "losses": resumed.differing(unbroken[saves]),
            "images": (seen.total() - len(seen), task.IMAGES - len(seen)) if seen else None,
            "resumed_at": resumed.resumed_at[0],
        }
    return result


def complete(name: str, saves: str, stops: tuple[int, ...] = (), epochs: int = EPOCHS) -> Run:
    """Runs a contestant to its end, killed in the given steps and resumed after each."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, stop in enumerate([*stops, None]):
            start(name, saves, folder, epochs, resume=number > 0, stop=stop)
        lines = [json.loads(line) for line in (folder / "steps.txt").read_text().splitlines()]
        if name == "ours":
            content = task.torch.load(folder / "checkpoints/last.pth", weights_only=True)
            weights = task.digest(content["model_state_dict"])
        else:
            weights = (folder / "final.txt").read_text().strip()
    return Run(
        weights,
        {line["step"]: line["loss"] for line in lines},
        {line["step"]: line["images"] for line in lines},
        [new["step"] for old, new in itertools.pairwise(lines) if new["step"] <= old["step"]],
    )


def start(
    name: str, saves: str, folder: Path, epochs: int, *, resume: bool, stop: int | None
) -> None:
    """Runs a contestant's process to its end, or until it is killed in the step `stop`."""
    if name == "ours":
        words = ["train.py", *OURS, f"train.epochs={epochs}"]
        words += [f"checkpoint.every_steps={task.SAVE_EVERY}"] if saves == "steps" else []
    else:
        words = ["bench/exact_contestants.py", name, saves, "--epochs", str(epochs)]
    command = [sys.executable, str(ROOT / words[0]), *words[1:], *(["--resume"] if resume else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "EXACT_STOP_AT": str(stop or 0)}
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=said, stderr=said, start_new_session=True
        )
    steps = folder / "steps.txt"
    while stop and process.poll() is None:
        last = steps.read_text().splitlines()[-1:] if steps.exists() else []
        if last and last[0].endswith("}") and json.loads(last[0])["step"] == stop:
            time.sleep(0.3)  # a thread may be writing the checkpoint
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    if process.wait() != (-signal.SIGKILL if stop else 0):
        raise RuntimeError(f"{name} failed:\n{(folder / 'said.txt').read_text()[-3000:]}")


# -- the picture ---------------------------------------------------------------------------------


def draw(file: Path) -> dict[str, int]:
    """Draws the loss of each step of two runs: unbroken, and killed five times.

    Returns:
        The number of steps that differ, by contestant.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    differing = {}
    figure, panels = pyplot.subplots(1, 2, figsize=(14.4, 5.2), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("ours", "lightning")):
        unbroken, resumed = (
            complete(name, "steps", stops, FIGURE_EPOCHS) for stops in ((), FIGURE_STOPS)
        )
        for run, style in ((unbroken, LIGHT), (resumed, DARK)):
            axes.plot(*zip(*sorted(run.losses.items())), **style)
        for number, stop in enumerate(FIGURE_STOPS):
            word = None if number else "kill -9"
            axes.axvline(stop, color="#b3261e", ls="--", lw=1.6, label=word)
        differing[name] = resumed.differing(unbroken)
        same = "are the same" if resumed.weights == unbroken.weights else "differ"
        note = f"{differing[name]} of {len(unbroken.losses)} steps differ, final weights {same}"
        axes.set_title(f"{label(name)}: killed five times", fontsize=21)
        axes.set_xlabel(f"step\n{note}", fontsize=19)
        axes.tick_params(labelsize=16)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss", fontsize=19)
    panels[0].legend(fontsize=16, loc="lower left", framealpha=1, edgecolor="white")
    figure.savefig(file, dpi=100)
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(32)  # a third of the bytes
    small.save(file, optimize=True)
    return differing


if __name__ == "__main__":
    main()
