"""A checkpoint is held against one description, to its leaves: it resumes exactly, or is refused."""

import copy
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import content
from conftest import TINY, assert_same_run

import train as train_script
from cnn.errors import Stopped
from cnn.training.saver import Saver
from cnn.utils.checkpoint import STRUCTURE_HASH

LION = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    p.sub_(mean.sign() * group["lr"])
        self.state["all"] = {"steps": self.state["all"].get("steps", 0) + 1}
"""
KINDS = {
    "sgd": ["optim.groups=[{match: classifier, lr_scale: 0.1}]", "train.early_stop_patience=9"],
    "adamw, plateau, averages": [
        *("optim.name=adamw", "optim.lr=0.01", "train.ema_decay=0.9", "schedule.name=plateau"),
        *("loss.class_weights=balanced", "schedule.warmup_epochs=0.5"),
    ],
    "an optimizer of one's own, fp16": ["optim.name=mine:Lion", "train.precision=fp16"],
}


class Begun:
    """A run that was stopped in its second epoch, and the same run unbroken."""

    def __init__(self, folder: Path, words: list[str]):
        self.folder = folder
        Path("mine.py").write_text(LION)
        words = [*TINY, *words, "train.epochs=3"]
        assert train_script.main(words) == 0
        for name in ("checkpoints", "logs"):
            shutil.move(name, Path("whole", name))
        original = Saver.between_steps

        def stop_at_6(saver: Saver) -> None:
            original(saver)
            if saver.state.step == 6:
                raise Stopped(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saver, "between_steps", stop_at_6)
            assert train_script.main(words) == 143
        shutil.move("checkpoints", "begun")
        self.content = torch.load("begun/last.pth", weights_only=True)

    def outcome(self, tree: Any, capfd: pytest.CaptureFixture, *, named: bool = True) -> str:
        """What becomes of the run with this in its last.pth: refused, equal or different.

        Args:
            named: a refusal names the file; else it may be of what its settings ask for.
        """
        os.chdir(self.folder)
        for name in ("checkpoints", "logs"):
            shutil.rmtree(name, ignore_errors=True)
        shutil.copytree("begun", "checkpoints")
        Path("checkpoints/last.pth").unlink()
        torch.save(tree, "checkpoints/last.pth")
        status = train_script.main(["--resume", "checkpoints/last.pth"])
        said = capfd.readouterr().err
        assert "Traceback" not in said and status in (0, 1, 2), said[-2000:]
        if status == 2:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and ("checkpoints/last.pth" in errors[0] or not named), said
            return "refused"
        try:
            assert_same_run("whole", ".")
        except AssertionError:
            return "different"
        return "equal"


@pytest.fixture(scope="module", params=KINDS)
def begun(request, tmp_path_factory) -> Iterator[Begun]:
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Begun(folder, KINDS[request.param])


# -- mutations -----------------------------------------------------------------------------------

ODD = (
    *(None, True, False, -1, 0, 1, 99, 10**12, 10**15, 2**63 - 1, 2**63, -(2**63), 2**70),
    *(0.5, -1.0, math.inf, -math.inf, math.nan, 1e308, "", "x", "x" * 1000, "\x1b[31m", [], {}),
    *([{}], [1], {"a": 1}, {1: 2}, (), (1, 2)),
)


def _backwards(t: torch.Tensor) -> list[int]:
    return list(range(t.ndim))[::-1]


TENSORS = {
    "scalar": lambda t: torch.ones(()),
    "empty": lambda t: torch.ones(0),
    "transposed": lambda t: t.reshape(t.shape).transpose(0, -1) if t.ndim else t,
    "permuted strides": lambda t: t.permute(*_backwards(t)).contiguous().permute(*_backwards(t)),
    "overlapping": lambda t: (
        t.flatten()[:1].expand(t.numel()).view(t.shape) if t.numel() else torch.ones(1).expand(9)
    ),
    "negative view": lambda t: torch._neg_view(-t) if t.is_floating_point() else -t,
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integers": lambda t: t.to(torch.int64),
    "sparse": lambda t: t.to_sparse(),
    "parameter": lambda t: torch.nn.Parameter(t.double()),
    "one more": lambda t: torch.cat([t, t]) if t.ndim else torch.ones(2),
    "slice of a larger": lambda t: torch.stack([t, t], -1)[..., 0],
}


def mutate(tree: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """A copy with one thing changed somewhere, and what."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any, str]] = []

    def walk(node: Any, path: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key, f"{path}.{key}"))
            if isinstance(value, (dict, list)):
                walk(value, f"{path}.{key}")

    walk(tree, "")
    node, key, path = draw.choice(places)
    value = node[key]
    kind = draw.choice(["odd", "odd", "delete", "rename", "add", "double", "tensor"])
    if kind == "tensor" and isinstance(value, torch.Tensor):
        kind = draw.choice(sorted(TENSORS))
        with torch.no_grad():
            node[key] = TENSORS[kind](value)
    elif kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        new = draw.choice([f"{key}x", 7, str(key), -1])
        node[new] = node.pop(key)
        kind = f"rename to {new!r}"
    elif kind == "add" and isinstance(node, dict):
        node[draw.choice(["x", 5, "params"])] = draw.choice(ODD)
    elif kind == "double" and isinstance(node, list):
        node.append(copy.deepcopy(value))
    else:
        new = draw.choice([*ODD, torch.ones(2), torch.ones((), dtype=torch.int64)])
        node[key], kind = new, f"{str(new)[:20]!r}"
    return tree, f"{path}: {kind}"


def mutations(begun: Begun, capfd, number: int, seed: int, *, outlined: bool) -> dict[str, int]:
    """What became of so many of them.

    Args:
        outlined: else as files of before are, of which other settings make another run.
    """
    draw, counts = random.Random(seed), dict.fromkeys(("refused", "equal", "different"), 0)
    base = {k: v for k, v in begun.content.items() if outlined or k != STRUCTURE_HASH}
    while sum(counts.values()) < number:
        tree, what = mutate(base, draw)
        if not outlined and what.startswith((".optimizer_state_dict.state", ".config.train.ep")):
            continue  # what is remembered of which parameter, and for how long, only the outline tells
        found = begun.outcome(tree, capfd, named=outlined)
        counts[found] += 1
        if os.environ.get("SHOW") or (outlined and found == "different"):
            with capfd.disabled():
                print(f"{found}: {what}")
    return counts


def test_a_mutated_checkpoint_is_refused_or_resumes_to_the_last_bit(begun, capfd):
    assert begun.outcome(begun.content, capfd) == "equal"
    counts = mutations(begun, capfd, 40, seed=15, outlined=True)
    assert counts["different"] == 0 and counts["refused"] > 20, counts


@pytest.mark.soak
@pytest.mark.parametrize("outlined", [True, False], ids=["saved again", "without its outline"])
def test_two_thousand_mutations(begun, capfd, outlined):
    number = int(os.environ.get("SOAK_MUTATIONS", "700"))
    counts = mutations(begun, capfd, number, seed=2000, outlined=outlined)
    with capfd.disabled():
        print(f"\n{number} mutations, seed 2000: {counts}")
    assert counts["refused"] > number / 2 and not (outlined and counts["different"])


# -- tensors that are not laid out as ours ---------------------------------------------------------


def memories(tree: dict[str, Any]) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """What the optimizer remembers of parameters of more than one dimension."""
    for memory in tree["optimizer_state_dict"]["state"].values():
        for name, value in memory.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                yield memory, name, value


FOREIGN = {
    "permuted strides": "equal",
    "slice of a larger": "equal",
    "overlapping": "whose numbers overlap in memory",
    "negative view": "got a conjugated or negated view",
    "conjugated": "got a conjugated or negated view",
    "sparse": "not opened",
    "double": "does not fit",
    "integers": "does not fit",
}


@pytest.mark.parametrize("kind, expected", FOREIGN.items(), ids=FOREIGN)
def test_what_an_optimizer_remembers_is_copied_into_the_layout_of_its_parameter(
    begun, capfd, kind, expected
):
    tree = copy.deepcopy(begun.content)
    for memory, name, value in list(memories(tree)):
        memory[name] = TENSORS[kind](value)
    tree.pop(STRUCTURE_HASH)
    if expected == "equal":
        strides = {value.stride() for _, _, value in memories(tree)}
        assert strides != {value.stride() for _, _, value in memories(begun.content)}
        assert begun.outcome(tree, capfd) == "equal"
        return
    if "mine" in begun.content["config"]["optim"]["name"] and expected == "does not fit":
        return  # it may remember whatever it likes
    os.chdir(begun.folder)
    torch.save(tree, "odd.pth")
    assert train_script.main(["--resume", "odd.pth"]) == 2
    said = capfd.readouterr().err
    assert expected in said and "odd.pth: " in said and "Traceback" not in said


def test_tensors_that_share_memory_are_counted_once_and_do_not_share_it_after(begun, capfd):
    tree = copy.deepcopy(begun.content)
    shapes: dict[Any, torch.Tensor] = {}
    shared = 0
    for memory, name, value in memories(tree):
        first = shapes.setdefault((name, value.shape), value)
        shared += first is not value
        memory[name] = first
    alone = copy.deepcopy(tree)
    for memory, name, value in memories(alone):
        memory[name] = value.clone()
    assert begun.outcome(alone, capfd) in ("different", "equal")
    results = torch.load("checkpoints/last.pth", weights_only=True)
    begun.outcome(tree, capfd)
    again = torch.load("checkpoints/last.pth", weights_only=True)
    for name, weight in results["model_state_dict"].items():
        assert torch.equal(weight, again["model_state_dict"][name]), name


# -- what a model may keep -------------------------------------------------------------------------

MODELS = """
import torch
from torch import nn


class Extra(nn.Sequential):
    '''Keeps a mapping beside its tensors, as quantised layers do.'''
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))
        self.seen = {"batches": 0, "sizes": []}
    def forward(self, images):
        if self.training:
            self.seen["batches"] += 1
            self.seen["sizes"].append(len(images))
        return super().forward(images) * (1 + self.seen["batches"] / 100)
    def get_extra_state(self):
        return self.seen
    def set_extra_state(self, state):
        self.seen = dict(state)


class Complex(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_channels * 64, num_classes, dtype=torch.complex64) / 9)
    def forward(self, images):
        return (images.flatten(1).to(torch.complex64) @ self.weight).abs()


class Unsavable(Extra):
    def get_extra_state(self):
        return self
    def set_extra_state(self, state):
        pass


class Sparse(Extra):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("mask", torch.eye(3).to_sparse())


class Tiny(Extra):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.uint16))
"""


@pytest.mark.parametrize("name", ["Extra", "Complex"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_mapping_beside_the_tensors_and_complex_weights_resume_exactly(train, name, optimizer):
    module = f"kept_{name}_{optimizer}"  # a name of its own: modules stay imported
    Path(f"{module}.py").write_text(MODELS)
    words = [f"model.name={module}:{name}", "model.args={}", f"optim.name={optimizer}"]
    assert train(*words, "train.epochs=4", "train.ema_decay=0.9") == 0
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    assert train(*words, "train.epochs=2", "train.ema_decay=0.9") == 0
    assert train("--resume", "train.epochs=4") == 0
    assert_same_run("whole", ".")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Unsavable", "model_state_dict._extra_state: expected a plain value, got Unsavable"),
        ("Sparse", "model_state_dict.mask: expected a plain tensor, got a sparse"),
        ("Tiny", "model_state_dict.steps: expected a plain tensor, got one of uint16"),
    ],
)
def test_what_could_not_be_read_again_is_refused_before_the_first_epoch(
    train, capfd, name, expected
):
    Path(f"kept_{name}.py").write_text(MODELS)
    assert train(f"model.name=kept_{name}:{name}", "model.args={}") == 2
    said = capfd.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not Path("checkpoints/last.pth").exists()


LATE = """
import torch

class Late(torch.optim.SGD):
    '''What it remembers is no plain value, and comes only with the second step.'''
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = {1, 2}
"""


def test_a_state_that_could_not_be_read_again_ends_the_run_at_once(train, capfd):
    Path("late.py").write_text(LATE)
    assert train("optim.name=late:Late", "train.epochs=9") == 2
    said = capfd.readouterr().err
    assert (
        "could not be read again from a checkpoint: optimizer_state_dict.state.0.seen: expected a plain"
        in said
    )
    assert "epoch 2/9" not in said and "Traceback" not in said


# -- optimizers of one's own keep the layout that they chose, which bits depend on -----------------

LAYOUTS = """
import torch

class Normed(torch.optim.Optimizer):
    '''Momentum that is kept contiguous, its step scaled by its norm, as LAMB and LARS do.'''
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros(p.shape, device=p.device))
                    mean.mul_(0.9).add_(p.grad)
                    p.add_(mean, alpha=-group["lr"] / (float(mean.norm()) + 1e-6))

class Factored(torch.optim.Optimizer):
    '''Keeps a factor as linear algebra gives it, column by column, as Shampoo and SOAP do.'''
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rows = p.grad.reshape(len(p), -1)
                    if "q" not in self.state[p]:
                        one = torch.eye(len(p), device=p.device)
                        self.state[p]["q"] = torch.linalg.qr(rows @ rows.T + one)[0]
                    q = self.state[p]["q"]
                    p.sub_((q @ (q.T @ rows)).reshape(p.shape), alpha=group["lr"])
                    self.state[p][0] = p.abs().sum()  # under a key that is no text
"""


@pytest.mark.parametrize("name", ["Normed", "Factored"])
@pytest.mark.filterwarnings("ignore:optim.weight_decay")
def test_an_optimizer_of_ones_own_has_its_memory_as_it_was(train, name):
    Path(f"layouts_{name}.py").write_text(LAYOUTS)
    words = [f"optim.name=layouts_{name}:{name}", "model.args={width: 16}", "optim.weight_decay=0"]
    assert train(*words, "train.epochs=4") == 0
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    assert train(*words, "train.epochs=1") == 0
    assert train("--resume", "train.epochs=4") == 0
    assert_same_run("whole", ".")


# -- what a file that nobody outlined could do ------------------------------------------------------

EDITS = {
    "an epoch beyond all": lambda tree: tree.update(epoch=10**12),
    "another step of the schedule": lambda tree: tree["scheduler_state_dict"].update(
        by_step={"last_epoch": 7}
    ),
    "a loss that is none": lambda tree: tree["history"][1].update(val_loss=None),
    "a time to come": lambda tree: tree.update(draws=99),
    "a best epoch of nowhere": lambda tree: tree["best"].update(epoch=99),
    "a count of text": lambda tree: tree["unfinished_epoch"]["sums"].update(count="3"),
    "rows of nothing": lambda tree: tree.update(history=[{}]),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_file_without_its_outline_is_held_against_what_can_be(train, capfd, change):
    tree = content()
    change(tree)
    torch.save(tree, "odd.pth")
    assert train("--resume", "odd.pth") == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "odd.pth: " in said and "Traceback" not in said
