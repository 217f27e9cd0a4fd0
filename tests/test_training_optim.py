"""The optimizer's groups, and the learning rate step by step."""

import copy
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from archives import content, saved
from conftest import assert_same_run
from torch import nn
from torch.optim import lr_scheduler
from torchvision import models

from cnn.config import OptimConfig, ScheduleConfig, load_config
from cnn.config.settings import GroupConfig
from cnn.errors import Refused
from cnn.training.optim import OPTIMIZERS, build_optimizer, freeze
from cnn.training.schedule import Schedule
from cnn.utils.checkpoint import load_checkpoint

STEPS, EPOCHS = 5, 8  # an epoch, a run
ALL = STEPS * EPOCHS


def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def groups_of(optimizer, net):
    """Parameter names of each group, with lr and weight decay."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return [
        ([names[p] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def test_biases_and_norms_have_no_weight_decay():
    net = model()
    groups = groups_of(build_optimizer(OptimConfig(lr=0.1, weight_decay=0.01), net), net)
    assert groups == [
        (["0.weight", "3.weight"], 0.1, 0.01),
        (["0.bias", "1.weight", "1.bias", "3.bias"], 0.1, 0.0),
    ]


def test_groups_have_their_own_lr_and_the_last_that_matches_counts():
    net = model()
    groups = [GroupConfig(lr_scale=0.5, match="^[01]"), GroupConfig(lr_scale=0.25, match=r"^1\.")]
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.01, groups=groups), net)
    lrs = {name: lr for names, lr, _ in groups_of(optimizer, net) for name in names}
    assert lrs == pytest.approx(
        {"0.weight": 0.05, "0.bias": 0.05, "3.weight": 0.1, "3.bias": 0.1}
        | {"1.weight": 0.025, "1.bias": 0.025}
    )


def test_an_lr_scale_of_0_freezes():
    net = model()
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer = build_optimizer(OptimConfig(groups=[GroupConfig(lr_scale=0, match="^[01]")]), net)
    net(torch.randn(6, 1, 3, 3)).square().sum().backward()
    optimizer.step()
    changed = [not old.equal(new) for old, new in zip(before, net.parameters())]
    assert changed == [False] * 4 + [True] * 2
    assert [parameter.requires_grad for parameter in net.parameters()] == changed


@pytest.mark.parametrize(
    "settings, part",
    [
        (
            {"groups": [GroupConfig(lr_scale=1, match="^3"), GroupConfig(lr_scale=1, match="fc")]},
            r"optim.groups\[1\].match: .*'fc'",
        ),
        (
            {"groups": [GroupConfig(lr_scale=0, match="")]},
            "optim.groups: every parameter is frozen",
        ),
        ({"args": {"nestrov": True}}, "optim.args: sgd: .*'nestrov'"),
        ({"args": {"nesterov": True}, "momentum": 0.0}, "optim.args: sgd: Nesterov"),
        ({"args": {"lr": 1}}, "optim.args: lr has a setting of its own: optim.lr"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(settings, part):
    with pytest.raises(Refused, match=f"^{part}"):
        build_optimizer(OptimConfig(**settings), model())


FUSED = ("sgd", "adam", "adamw", "adagrad")  # have a kernel for that, on CPU and CUDA
WITH_MOMENTUM = ("sgd", "rmsprop")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_torchs_bit_for_bit_and_goes_on_from_its_state(name):
    net = model()
    cfg = OptimConfig(name, lr=0.01, weight_decay=0.01)
    optimizer = build_optimizer(cfg, net)
    theirs_net = copy.deepcopy(net)
    groups = [[p for p in theirs_net.parameters() if (p.ndim > 1) is big] for big in (True, False)]
    options = {"momentum": 0.9} if name in WITH_MOMENTUM else {}
    options |= {"fused": True} if name in FUSED else {}
    theirs = OPTIMIZERS[name](
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}],
        lr=0.01,
        **options,
    )
    for step in range(4):
        if step == 2:  # through a checkpoint
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(cfg, net)
            optimizer.load_state_dict(saved)
        images = torch.randn(6, 1, 3, 3)
        for each, its in ((net, optimizer), (theirs_net, theirs)):
            each(images).square().sum().backward()
            its.step()
            its.zero_grad(set_to_none=True)
    assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9
    for ours, other in zip(net.parameters(), theirs_net.parameters()):
        assert ours.equal(other) and ours.isfinite().all() and ours.grad is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_at_first_steps_afterwards_and_goes_on_from_its_state(name):
    cfg = OptimConfig(name, lr=0.01, weight_decay=0.01, freeze="^[01]", freeze_epochs=1)
    after = []
    for interrupted_at in (None, 1, 2, 3):
        torch.manual_seed(0)
        net = model()
        optimizer, first = build_optimizer(cfg, net), net[0].weight.clone()
        for step in range(4):  # two an epoch
            if step == interrupted_at:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = build_optimizer(cfg, net.requires_grad_(True))
                optimizer.load_state_dict(saved)
            freeze(optimizer, step // 2)
            net(torch.randn(6, 1, 3, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert net[0].weight.equal(first) == (step < 2)
        after.append(torch.cat([parameter.flatten() for parameter in net.parameters()]))
    assert all(other.equal(after[0]) for other in after[1:])


# ---------------------------------------------------------------------------------------------
# Of the user's own, by import path

OWN = """
import torch

class Counting(torch.optim.Optimizer):
    '''Keeps a row for each weight matrix, and a counter in its groups: no setting of ours.'''

    def __init__(self, params, lr, momentum=0.5, rise=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "rise": rise, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                memory = self.state[p]
                row = memory.setdefault("row", torch.zeros(7, dtype=torch.float64))
                row += group["steps"] / 3
                memory.setdefault("count", {"of": torch.zeros((), dtype=torch.int64)})["of"] += 1
                rise = (1 + group["rise"]) ** group["steps"]
                p -= group["lr"] * rise * (p.grad + (row[0] / 1000).float())

def no_optimizer(params, lr):
    return list(params)

def counting(params, lr, **more):
    return Counting(params, lr, **more)

def adamw(params, lr, **more):
    return torch.optim.AdamW(params, lr, **more)

class Asks(Counting):
    def step(self, closure):
        closure()
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def test_an_optimizer_of_ones_own_is_given_the_settings_that_its_signature_has(own, caplog):
    made = build_optimizer(OptimConfig("mine:Counting", momentum=0.25, args={"rise": 0.1}), model())
    assert type(made).__name__ == "Counting"
    assert {(group["momentum"], group["rise"]) for group in made.param_groups} == {(0.25, 0.1)}
    assert "optim.weight_decay: mine:Counting takes none" in caplog.text
    caplog.clear()
    build_optimizer(OptimConfig("mine:adamw"), model())
    assert "takes none" not in caplog.text
    made = build_optimizer(OptimConfig("mine:counting"), model())
    assert made.param_groups[0]["momentum"] == 0.5, "a factory that names no momentum has its own"


@pytest.mark.parametrize(
    "name, args, part",
    [
        ("mine:Counting", {"momentum": 1}, "optim.args: momentum has a setting of its own"),
        ("mine:Counting", {"weight_decay": 1}, "optim.args: weight_decay has a setting of its own"),
        ("mine:Counting", {"speed": 1}, "optim.args: mine:Counting: .*speed"),
        ("mine:no_optimizer", {}, "optim.name: mine:no_optimizer: expected an Optimizer, got list"),
        ("mine:Asks", {}, "optim.name: mine:Asks: needs a closure"),
        ("torch.optim:LBFGS", {}, "optim.name: torch.optim:LBFGS: .*parameter groups"),
        ("mine:Nobody", {}, "optim.name: the module mine .* has no 'Nobody'"),
    ],
)
def test_an_optimizer_that_no_step_here_can_use_is_refused(own, name, args, part):
    with pytest.raises(Refused, match=f"^{part}"):
        build_optimizer(OptimConfig(name, args=args), model())


def test_a_run_with_an_optimizer_of_ones_own_goes_on_with_all_that_it_remembers(own, train):
    words = ["optim.name=mine:Counting", "optim.args={rise: 0.01}", "train.epochs=3"]
    assert train(*words) == 0
    Path("whole").mkdir()
    for kind in ("logs", "checkpoints"):
        shutil.move(kind, f"whole/{kind}")
    assert train(*words, "train.epochs=1") == 0
    assert train("--resume", "train.epochs=3") == 0
    assert_same_run("whole", ".")
    saved = load_checkpoint(Path("checkpoints/last.pth"))["optimizer_state_dict"]
    assert {group["steps"] for group in saved["param_groups"]} == {12}
    assert all(memory for memory in saved["state"].values()), "of what never stepped there is none"
    assert train("--resume", "train.epochs=4", "optim.args={rise: 0.5}") == 0
    saved = load_checkpoint(Path("checkpoints/last.pth"))["optimizer_state_dict"]
    assert {(group["steps"], group["rise"]) for group in saved["param_groups"]} == {(16, 0.5)}


def test_a_keyword_that_becomes_a_setting_is_no_longer_one_of_args():
    @dataclass(frozen=True)
    class More(OptimConfig):
        nesterov: bool = False

    assert build_optimizer(More(nesterov=True), model()).param_groups[0]["nesterov"] is True
    made = build_optimizer(OptimConfig(args={"nesterov": True}), model())
    assert made.param_groups[0]["nesterov"] is True
    with pytest.raises(Refused, match="^optim.args: nesterov has a setting of its own"):
        build_optimizer(More(args={"nesterov": True}), model())


# ---------------------------------------------------------------------------------------------
# The schedule


def start(name, epochs=EPOCHS, mode="min", lrs=(0.5,), **settings):
    """A schedule and its optimizer over parameters with these learning rates."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=lrs[0])
    return Schedule(ScheduleConfig(name, **settings), optimizer, STEPS, epochs, mode), optimizer


def run(schedule, optimizer, steps=ALL, metrics=None, done=0):
    """The learning rate of each of the steps, and the metric told at every epoch's end."""
    lrs = []
    for step in range(done + 1, done + steps + 1):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if step % STEPS == 0:
            schedule.end_epoch(metrics[step // STEPS - 1] if metrics else 1.0)
    return lrs


def lrs_of(name, **settings):
    return run(*start(name, **settings))


def torchs_own(make, per_step):
    """The learning rate of each step with one of torch's schedulers, called a step or an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)
    lrs = []
    for step in range(1, ALL + 1):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < ALL and (per_step or step % STEPS == 0):
            scheduler.step()
    return lrs


def test_constant_is_constant():
    assert lrs_of("constant") == [0.5] * ALL


@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_cosine_is_torchs_a_step_at_a_time(min_lr):
    theirs = torchs_own(lambda o: lr_scheduler.CosineAnnealingLR(o, ALL, min_lr), per_step=True)
    assert lrs_of("cosine", min_lr=min_lr) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_step_is_torchs(gamma):
    theirs = torchs_own(lambda o: lr_scheduler.StepLR(o, 3, gamma), per_step=False)
    assert lrs_of("step", step_epochs=3, gamma=gamma) == pytest.approx(theirs)


def test_multistep_is_torchs():
    theirs = torchs_own(lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 6]), per_step=False)
    assert lrs_of("multistep", milestones=[6, 2, 3]) == pytest.approx(theirs)


def test_onecycle_is_torchs():
    def make(optimizer):  # told of one step more; its rise ends at step 0.3 * ALL, as ours does
        total, share = ALL + 1, (0.3 * ALL + 1) / (ALL + 1)
        return lr_scheduler.OneCycleLR(optimizer, 0.5, total, pct_start=share, cycle_momentum=False)

    lrs = lrs_of("onecycle")
    assert lrs == pytest.approx(torchs_own(make, per_step=True))
    assert lrs.index(max(lrs)) == 0.3 * ALL


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "multistep", "plateau"])
def test_warm_up_rises_in_equal_steps_to_what_comes_after(name):
    lrs = lrs_of(name, warmup_epochs=1.6, step_epochs=7, milestones=[7])
    assert lrs[:8] == pytest.approx([0.5 * (i + 1) / 9 for i in range(8)])
    assert lrs[8] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "multistep", "plateau"])
def test_a_warm_up_may_be_given_in_steps(name):
    settings = {"step_epochs": 7, "milestones": [7]}
    in_steps = lrs_of(name, warmup_steps=2 * STEPS, **settings)
    assert in_steps == lrs_of(name, warmup_epochs=2, **settings) != lrs_of(name, **settings)


def test_onecycle_rises_by_itself_and_takes_no_warm_up():
    for warmup in ({"warmup_epochs": 2}, {"warmup_steps": 7}):
        assert lrs_of("onecycle", **warmup) == lrs_of("onecycle")


def test_a_warm_up_in_steps_takes_the_place_of_one_in_epochs(train, capfd):
    assert lrs_of("cosine", warmup_steps=9, warmup_epochs=1) == lrs_of("cosine", warmup_steps=9)
    assert lrs_of("cosine", warmup_steps=0, warmup_epochs=1) == lrs_of("cosine")
    assert train("schedule.warmup_epochs=1", "schedule.warmup_steps=3", "train.epochs=1") == 0
    assert "constant after 3 steps of warm-up, 1 epochs of" in capfd.readouterr().err


def test_a_warm_up_longer_than_the_run_is_told(train, capfd):
    assert train("schedule.warmup_steps=1000", "train.epochs=1") == 0
    assert (
        "the warm-up takes 1000 steps: lr is not reached in the 4 steps" in capfd.readouterr().err
    )


def test_cosine_falls_over_what_is_left_after_the_warm_up():
    lrs = lrs_of("cosine", warmup_epochs=2)
    expected = [0.5 * (1 + math.cos(math.pi * i / 30)) / 2 for i in range(30)]
    assert lrs[10:] == pytest.approx(expected)


def test_warm_up_does_not_put_off_the_drops():
    assert lrs_of("step", step_epochs=4, warmup_epochs=1)[20:] == pytest.approx([0.05] * 20)


def test_every_group_keeps_its_share():
    schedule, optimizer = start("cosine", lrs=(0.1, 0.5), min_lr=0.05, warmup_epochs=1)
    for _ in range(ALL):
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert low == pytest.approx(high / 5)
        run(schedule, optimizer, 1)
    assert high == pytest.approx(0.05, abs=0.01) and high > 0.05


def test_after_the_last_step_the_lr_stays_at_its_least():
    schedule, optimizer = start("cosine", min_lr=0.01)
    run(schedule, optimizer)
    assert run(schedule, optimizer, 7) == pytest.approx([0.01] * 7)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_lowers_lr_after_so_many_epochs_without_improvement(mode):
    losses = [9, 8, 8, 9, 8, 7, 7, math.nan]
    metrics = losses if mode == "min" else [10 - loss for loss in losses]
    schedule, optimizer = start("plateau", mode=mode, patience=1, gamma=0.5, min_lr=0.2)
    lrs = run(schedule, optimizer, metrics=metrics)[::STEPS]
    # The epochs' metrics: better, better, worse, worse (drop), worse, better, worse, worse (drop).
    assert lrs == [0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.2, "not below min_lr"


def test_plateau_does_not_judge_while_it_warms_up():
    schedule, optimizer = start("plateau", warmup_epochs=3, patience=0)
    lrs = run(schedule, optimizer, metrics=[1, 2, 3, 4, 2.5, 5, 5, 5])[15::STEPS]
    # Epoch 3, in which the warm-up ends, is the first that counts.
    assert lrs == pytest.approx([0.5, 0.05, 0.05, 0.005, 0.0005])


@pytest.mark.parametrize("done", [0, 3, 5, 13, 20, 39])
@pytest.mark.parametrize("name", ["constant", "cosine", "step", "multistep", "onecycle", "plateau"])
def test_a_schedule_goes_on_from_its_state_as_if_never_stopped(name, done):
    settings = {"warmup_epochs": 1.5, "step_epochs": 2, "milestones": [3, 5], "patience": 0}
    metrics = [3.0, 2.0, 3.0, 1.0, 2.0, 2.0, 1.0, 0.5]
    whole = run(*start(name, **settings), metrics=metrics)
    schedule, optimizer = start(name, **settings)
    assert run(schedule, optimizer, done, metrics) == whole[:done]
    again, other = start(name, **settings)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert run(again, other, ALL - done, metrics, done) == whole[done:]


def test_a_lengthened_run_goes_on_along_the_longer_curve():
    schedule, optimizer = start("cosine")
    run(schedule, optimizer, 20)
    longer, other = start("cosine", epochs=2 * EPOCHS)
    other.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(schedule.state_dict())
    assert run(longer, other, 20, done=20) == run(*start("cosine", epochs=2 * EPOCHS))[20:]


SLOW = "^(([a-z0-9_.]+)+)+!$"  # takes three to the power of the length of a name


def test_patterns_that_would_take_for_ever_are_refused(train, capfd, monkeypatch):
    monkeypatch.setattr("cnn.training.optim.MATCH_TIMEOUT", 0.5)
    for words in (
        [f"optim.groups=[{{match: '{SLOW}', lr_scale: 0.5}}]"],
        [f"optim.freeze={SLOW}", "optim.freeze_epochs=1"],
    ):
        assert train(*words) == 2
        assert "takes more than 0.5 s to match" in capfd.readouterr().err
    assert train("optim.freeze=" + "a" * 501, "optim.freeze_epochs=1") == 2
    assert "optim.freeze: expected at most 500 characters, got 501" in capfd.readouterr().err
    for pattern in ("a{99999999999999999999}", "(" * 250 + ")" * 250):
        assert train(f"optim.freeze={pattern}", "optim.freeze_epochs=1") == 2
        assert "Traceback" not in capfd.readouterr().err


def test_a_pattern_of_a_file_cannot_hang_a_resume(train, capfd, monkeypatch):
    tree = content()
    tree["config"]["optim"] |= {"freeze": SLOW, "freeze_epochs": 1}
    Path("mine.pth").write_bytes(saved(tree))
    monkeypatch.setattr("cnn.training.optim.MATCH_TIMEOUT", 0.5)
    assert train("--resume", "mine.pth") == 2
    assert "takes more than 0.5 s" in capfd.readouterr().err


# -- the head, the backbone, and layers -----------------------------------------------------------


def lr_of(cfg: OptimConfig, net: nn.Module, new: Sequence[str] = ()) -> dict[str, float]:
    return {
        name: lr
        for names, lr, _ in groups_of(build_optimizer(cfg, net, new), net)
        for name in names
    }


@pytest.mark.parametrize("part, slow", [("backbone", "0 1"), ("body", "0 1"), ("head", "3")])
def test_a_part_is_named_and_not_matched(part, slow):
    rates = lr_of(OptimConfig(lr=0.1, groups=[GroupConfig(lr_scale=0.1, part=part)]), model())
    assert {name[0] for name, lr in rates.items() if lr < 0.1} == set(slow.split())


def test_what_is_new_is_the_head(caplog):
    cfg = OptimConfig(lr=0.1, groups=[GroupConfig(lr_scale=0.1, part="backbone")])
    new = ["1.weight", "1.bias", "3.weight", "3.bias"]
    rates = lr_of(cfg, model(), new)
    assert rates["0.weight"] == pytest.approx(0.01) and all(rates[name] == 0.1 for name in new)
    assert not caplog.messages
    rates = lr_of(cfg, model(), ["0.weight"])  # the last layer came from weights, and is the head
    assert rates["3.weight"] == rates["0.weight"] == 0.1 and rates["1.weight"] < 0.1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"groups": [GroupConfig(lr_scale=0.1, match="[03]")]}, "3.weight, 3.bias; part: backbone"),
        ({"freeze": "[13]", "freeze_epochs": 1}, "3.weight, 3.bias; part: backbone"),
        ({"groups": [GroupConfig(lr_scale=0.5, match=".")]}, "is every parameter"),
    ],
    ids=["slow", "frozen", "everything"],
)
def test_a_group_that_holds_the_new_head_back_is_told(settings, said, caplog):
    build_optimizer(OptimConfig(**settings), model(), ["3.weight", "3.bias"])
    assert said in caplog.text


def test_freeze_without_epochs_is_told_and_a_slip_is_refused(caplog):
    build_optimizer(OptimConfig(freeze="backbone"), model())
    assert "no effect, since optim.freeze_epochs is 0" in caplog.text
    with pytest.raises(Refused, match="optim.freeze: .*'backbon'.*head or backbone"):
        build_optimizer(OptimConfig(freeze="backbon"), model())
    groups = [GroupConfig(lr_scale=0, part="backbone")]  # frozen for good already
    build_optimizer(OptimConfig(groups=groups, freeze="backbone", freeze_epochs=1), model())


@pytest.mark.parametrize("part", ["backbone", "body"])
def test_the_backbone_can_be_frozen_by_its_name(part):
    net = model()
    optimizer = build_optimizer(OptimConfig(freeze=part, freeze_epochs=1), net)
    freeze(optimizer, 0)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == ["3.weight", "3.bias"]


def layers_of(net: nn.Module, decay: float = 0.5) -> dict[str, int]:
    """How often the rate of each parameter is decayed."""
    rates = lr_of(OptimConfig(lr=1.0, layer_decay=decay), net)
    return {name: round(math.log(lr, decay)) for name, lr in rates.items()}


def test_the_rate_falls_from_the_head_down():
    layers = layers_of(models.resnet18())
    assert layers["fc.weight"] == 0 and layers["layer4.1.bn2.weight"] == 1
    assert layers["layer4.0.downsample.0.weight"] == 2 and layers["layer1.0.conv1.weight"] == 8
    assert layers["conv1.weight"] == layers["bn1.weight"] == 9


def test_the_layers_of_a_transformer_are_its_blocks():
    layers = layers_of(models.vit_b_16(), 0.9)
    assert layers["heads.head.weight"] == 0 and layers["encoder.ln.weight"] == 1
    for block in range(12):
        prefix = f"encoder.layers.encoder_layer_{block}"
        assert layers[f"{prefix}.ln_1.weight"] == layers[f"{prefix}.mlp.3.weight"] == 12 - block
    assert {
        layers[name] for name in ("class_token", "conv_proj.weight", "encoder.pos_embedding")
    } == {13}


def test_branches_are_one_layer():
    layers = layers_of(models.inception_v3(init_weights=False), 0.9)
    assert (
        layers["Mixed_7c.branch_pool.conv.weight"] == layers["Mixed_7c.branch1x1.conv.weight"] == 1
    )
    assert max(layers.values()) < 20


def test_blocks_within_stages_are_layers():
    timm = pytest.importorskip("timm")
    layers = layers_of(timm.create_model("convnext_atto"), 0.9)
    assert layers["stages.3.blocks.1.mlp.fc1.weight"] == 1
    assert layers["stages.3.blocks.0.mlp.fc1.weight"] == 2


def test_layers_without_numbers_are_refused():
    with pytest.raises(Refused, match="optim.layer_decay: expected numbered blocks"):
        build_optimizer(OptimConfig(layer_decay=0.5), models.densenet121())


def test_a_group_needs_one_way_to_say_what_it_is():
    for group in ("{lr_scale: 0.1}", "{lr_scale: 0.1, part: head, match: fc}"):
        with pytest.raises(Refused, match=r"optim.groups\[0\]: expected part"):
            load_config(None, [f"optim.groups=[{group}]"])
