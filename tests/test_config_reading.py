"""The configuration: what is read, what is refused and in which words, what comes out again."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPES

from cnn.config import Config, load_config, resume_rules, to_dict, to_yaml, with_values
from cnn.config.settings import keys_of
from cnn.errors import Refused
from cnn.utils.run_folder import CHECKPOINTS, EXPORTS, OWNER, RunLogs

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = RECIPES


def write(folder, text, name="my.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path, *overrides):
    """The message of a refusal, with the file's folder left out."""
    with pytest.raises(Refused) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_files_shipped_are_accepted(path):
    cfg, places = load_config(path)
    assert cfg != Config() and places["data.name"].startswith(str(ROOT / "configs"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_print_config_prints_reads_back_the_same(path, tmp_path):
    cfg, _ = load_config(path)
    printed = to_yaml(cfg)
    again, places = load_config(write(tmp_path, printed))
    assert again == cfg
    assert set(places) == set(resume_rules()), "every key is printed"
    assert all("#" in line for line in printed.splitlines() if ": " in line), "with its meaning"


def test_what_is_printed_tells_the_choices():
    printed = to_yaml(Config())
    assert (
        "  # learning rate schedule: constant, step, multistep, cosine, onecycle, plateau\n"
        in printed
    )
    assert "erase, randaugment, trivialaugment, package.module:name\n" in printed
    for key, field in keys_of(Config):
        about = f"  # {field.metadata['description']}"
        (comment,) = (
            about + line.partition(about)[2] for line in printed.splitlines() if about in line
        )
        assert all(choice in comment for choice in field.metadata["choices"]), key


TRICKY = [
    "data.root=C: a #b, [c] {d} 'e' \"f\" & * ! % @ `",
    "data.root=照片/我 的 猫",
    "run='null'",
    "run='none'",
    "data.tag=true",
    "data.tag=0x10",
    "optim.lr=1e-30",
    "seed=9223372036854775807",
    "data.args={a: [1, 2.5, null, true], b: {c: text}, d: '1', e: 'true', f: ''}",
    "data.args={a: '1e-3', b: '5e3', c: 'None', d: '~'}",
    "loss.class_weights=[1, 2.5e-3]",
    "optim.groups=[{match: '^(?!fc)|[#:]', lr_scale: 0}, {match: bn, lr_scale: 0.1}]",
]


@pytest.mark.parametrize("override", TRICKY)
def test_any_value_survives_being_printed_and_read(override, tmp_path):
    cfg, _ = load_config(None, [override])
    assert cfg != Config()
    assert load_config(write(tmp_path, to_yaml(cfg)))[0] == cfg
    assert load_config(None, base=to_dict(cfg))[0] == cfg, "as it comes out of a checkpoint"


MISTAKES = {
    "unknown key": ("optim:\n  lrate: 1", "my.yaml:2: optim.lrate: no such key", "'optim.lr'"),
    "wrong section": (
        "train:\n\n  batch_size: 1",
        "my.yaml:3: train.batch_size",
        "'data.batch_size'",
    ),
    "unknown section": ("optimizer:\n  lr: 1", "my.yaml:1: optimizer: no such key"),
    "unknown at the top": ("sed: 1", "my.yaml:1: sed: no such key", "did you mean 'seed'?"),
    "text for a number": ("optim:\n  lr: high", "my.yaml:2: optim.lr: expected a number", "high"),
    "quoted number": ("optim: {lr: '0.1'}", "my.yaml:1: optim.lr: expected a number", "'0.1'"),
    "out of range": ("optim:\n  lr: -0.1", "my.yaml:2: optim.lr", "a number above 0, got -0.1"),
    "at the lower limit": ("optim: {lr: 0}", "my.yaml:1: optim.lr", "above 0, got 0"),
    "at the limit": ("data:\n  val_fraction: 1", "data.val_fraction", "above 0 and below 1, got 1"),
    "not finite": ("optim: {lr: .inf}", "my.yaml:1: optim.lr: expected a number above 0, got .inf"),
    "too large for a float": ("optim: {lr: 1e999}", "my.yaml:1: optim.lr", "got 1e999"),
    "bool for int": ("train: {epochs: true}", "my.yaml:1: train.epochs: expected a whole number"),
    "10.5 for int": ("train: {epochs: 10.5}", "my.yaml:1: train.epochs", "at least 1, got 10.5"),
    "yes for bool": ("train: {compile: yes}", "my.yaml:1: train.compile: expected true or false"),
    "null for text": ("data: {root: null}", "my.yaml:1: data.root: expected text, got null"),
    "nothing for int": ("seed:", "my.yaml:1: seed: expected a whole number", "got nothing"),
    "not a choice": ("data: {name: cifer10}", "my.yaml:1: data.name", "did you mean 'cifar10'?"),
    "not a choice, in a list": ("data:\n  augment: [crop, flop]", "my.yaml:2: data.augment[1]"),
    "scalar for a list": (
        "data:\n  augment: crop",
        "my.yaml:2: data.augment: expected a list",
        "one of crop, flip,",
        "or {name, scale, ratio, padding, probability, side, degrees, brightness, contrast,",
    ),
    "scalar for a mapping": ("data:\n  args: 3", "my.yaml:2: data.args: expected a mapping"),
    "list for a scalar": ("seed: [1]", "my.yaml:1: seed: expected a whole number", "got a list"),
    "mapping for a scalar": ("seed: {a: 1}", "my.yaml:1: seed: expected", "got a mapping"),
    "scalar for a section": ("seed: 1\ndata: x", "my.yaml:2: data: expected a section of keys"),
    "list for a section": ("data: [x]", "my.yaml:1: data: expected a section of keys"),
    "no mapping at all": ("- seed", "my.yaml:1: expected `section:` and `key: value` lines"),
    "given twice": ("seed: 1\n\nseed: 2", "my.yaml:3: seed: given twice, first at", "my.yaml:1"),
    "twice in a section": ("optim:\n  lr: 1\n  lr: 1", "my.yaml:3: optim.lr: given twice"),
    "section twice": ("data: {}\ndata: {}", "my.yaml:2: data: given twice"),
    "group without match": ("optim:\n  groups: [{lr_scale: 1}]", "optim.groups[0]: expected part"),
    "group without scale": ("optim: {groups: [{match: a}]}", "my.yaml:1: optim.groups[0].lr_scale"),
    "unknown in a group": ("optim: {groups: [{mach: a}]}", "groups[0].mach", "mean 'match'?"),
    "twice in a group": ("optim: {groups: [{match: a, match: b}]}", "groups[0].match: given twice"),
    "twice in args": ("data: {args: {a: 1, a: 2}}", "my.yaml:1: data.args", "given twice"),
    "unknown in a mapping": (
        "data: {augment: [{name: crop, sale: 1}]}",
        "augment[0].sale: no such",
    ),
    "mapping without a name": ("data: {augment: [{scale: [1]}]}", "augment[0].name: missing"),
    "mapping of no choice": ("data: {augment: [{name: flop}]}", "augment[0].name", "mean 'flip'?"),
    "wrong in a mapping": (
        "data: {augment: [{name: crop, scale: 1}]}",
        "[0].scale: expected a list",
    ),
    "range in a mapping": ("data: {augment: [{name: resized_crop, scale: [0, 1]}]}", "scale[0]"),
    "bounds the wrong way": (
        "data:\n  augment: [flip, {name: resized_crop, scale: [1, 0.5]}]",
        "my.yaml:2: data.augment[1].scale: expected the smallest and the largest value",
    ),
    "scale of another": (
        "data: {augment: [{name: crop, scale: [0.5, 1]}]}",
        "my.yaml:1: data.augment[0].scale: is for resized_crop, not for crop",
    ),
    "group no mapping": ("optim: {groups: [fc]}", "my.yaml:1: optim.groups[0]: expected {part"),
    "group frozen below 0": ("optim: {groups: [{match: a, lr_scale: -1}]}", "groups[0].lr_scale"),
    "bad pattern": (
        "optim:\n  groups: [{match: (, lr_scale: 1}]",
        "my.yaml:2",
        "[0].match: expected a regular",
    ),
    "weights below 0": ("loss: {class_weights: [1, -1]}", "my.yaml:1: loss.class_weights[1]"),
    "device": ("seed: 1\ndevice: gpu", "my.yaml:2: device: expected auto, cpu, cuda", "got gpu"),
    "run with a path": ("run: ../mine", "my.yaml:1: run: expected a name of letters"),
    "run called archive": ("run: archive", "my.yaml:1: run: expected a name for folders"),
    "run called as a record": ("run: Report.html", "my.yaml:1: run: expected a name for folders"),
    "run called as a checkpoint": ("run: mine.pth", "my.yaml:1: run: expected a name for folders"),
    "run called as a leftover": ("run: mine.tmp", "my.yaml:1: run: expected a name for folders"),
    "run hidden": ("run: .mine", "my.yaml:1: run: expected a name of letters"),
    "no milestones": ("schedule:\n  name: multistep", "schedule.milestones: missing"),
    "balanced twice": (
        "data: {sampler: balanced}\nloss: {class_weights: balanced}",
        "my.yaml:2: loss.class_weights: balanced cannot go with data.sampler: balanced",
    ),
    "bad pattern to freeze": ("optim: {freeze: '('}", "my.yaml:1: optim.freeze: expected a reg"),
    "anchor": ("seed: &a 1", "my.yaml:1: anchors and aliases (& *) are not allowed"),
    "alias": ("run: a\nseed: *a", "my.yaml:2: anchors and aliases (& *) are not allowed"),
    "tag": ("run: a\nseed: !!int 1", "my.yaml:2: tags (!) are not allowed, got tag"),
    "tag of Python": ("seed: !!python/object:os.system 1", "my.yaml:1: tags (!) are not allowed"),
    "unclosed": ("seed: 1\ndata: [1", "my.yaml:2: not valid YAML"),
    "tabs": ("optim:\n\tlr: 3", "my.yaml:2: not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2", "my.yaml:2: not valid YAML"),
    "nested too deep": ("data: {args: " + "[" * 1000, "my.yaml:1: nested deeper"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff", "my.yaml:1: expected UTF-8 text"),
    "zeros": (b"seed: 1\0", "my.yaml:1: not valid YAML"),
    "too large": ("#" * 2_000_000, "my.yaml: expected a configuration, got a file of more than"),
    "base in a circle": ("base: my.yaml", "my.yaml", "base: the files name each other in a circle"),
    "base missing": ("seed: 1\nbase: no.yaml", "my.yaml:2: base: expected a file", "no.yaml"),
    "base too long": ("base: " + "a" * 300, "my.yaml:1: base: expected a file"),
    "base a list": ("base: [a.yaml]", "my.yaml:1: base: expected a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_with_file_line_and_key(mistake, tmp_path):
    text, *parts = mistake
    message = refusal(write(tmp_path, text))
    assert all(part in message for part in parts), message
    assert message.count("\n") == 0, "one mistake, one line"


@pytest.mark.parametrize(
    "override, part",
    [
        ("optim.lr=-1", "command line: optim.lr: expected a number above 0, got -1"),
        ("optim.rl=1", "command line: optim.rl: no such key — did you mean 'optim.lr'?"),
        ("optim=1", "command line: optim: is a section; write optim.KEY=value"),
        ("train.epochs=", "command line: train.epochs: expected a whole number"),
        ("data.augment=[crop", "command line: data.augment: not valid YAML"),
        ("lr", "command line: expected section.key=value, got 'lr'"),
        ("base=a.yaml", "command line: base: no such key"),
    ],
)
def test_a_mistake_on_the_command_line_is_refused(override, part, tmp_path):
    assert part in refusal(write(tmp_path, "seed: 1"), override)


def test_all_mistakes_are_told_at_once(tmp_path):
    text = "seed: true\noptim:\n  lr: fast\n  lrs: 1\ndata: 3\n"
    lines = refusal(write(tmp_path, text), "train.epochs=0", "x").splitlines()
    places = ["my.yaml:1: seed", "my.yaml:3: optim.lr:", "my.yaml:4: optim.lrs", "my.yaml:5: data:"]
    places += ["command line: train.epochs", "command line: expected section.key=value"]
    assert len(lines) == len(places)
    assert all(any(line.startswith(place) for line in lines) for place in places), lines


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "no.yaml: cannot read the configuration" in refusal(tmp_path / "no.yaml")
    with pytest.raises(Refused, match="cannot read the configuration"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text, value", [("1e-3", 0.001), ("5E+2", 500.0), ("1_000", 1000.0), (".5", 0.5), ("+2", 2.0)]
)
def test_a_number_may_be_written_in_any_usual_way(text, value, tmp_path):
    cfg, _ = load_config(write(tmp_path, f"optim: {{lr: {text}}}"), [f"loss.args={{x: {text}}}"])
    assert cfg.optim.lr == value and isinstance(cfg.optim.lr, float)
    assert cfg.loss.args == {"x": value}


def test_the_command_line_wins_over_the_file_and_the_file_over_its_base(tmp_path):
    write(
        tmp_path, "seed: 1\ntrain: {epochs: 1}\noptim: {lr: 1}\nloss: {args: {a: 1}}", "base.yaml"
    )
    path = write(tmp_path, "base: base.yaml\ntrain: {epochs: 2}\noptim: {lr: 2}\n")
    cfg, places = load_config(path, ["optim.lr=3", "optim.lr=4"])
    assert (cfg.seed, cfg.train.epochs, cfg.optim.lr, cfg.loss.args) == (1, 2, 4.0, {"a": 1})
    assert places["seed"] == f"{tmp_path}/base.yaml:1"
    assert places["train.epochs"] == f"{path}:2"
    assert places["optim.lr"] == "command line"
    assert "data.root" not in places, "what was given nowhere has no place"


@pytest.mark.parametrize(
    "typed, args",
    [
        ([], {"width": 16}),
        (["model.name=resnet9"], {"width": 16}),  # the same name
        (["model.name=resnet18"], {}),
        (["model.name=resnet20", "model.args={blocks: 1}"], {"blocks": 1}),
        (["model.args={blocks: 1}", "model.name=resnet20"], {"blocks": 1}),
        (["optim.name=adam"], {"width": 16}),
    ],
)
def test_a_new_name_does_not_take_over_the_arguments_of_the_old_one(tmp_path, typed, args):
    base, above = tmp_path / "base.yaml", tmp_path / "above.yaml"
    base.write_text("model: {name: simple_cnn, args: {dropout: 0.1}}\noptim: {name: sgd}\n")
    above.write_text("base: base.yaml\nmodel: {name: resnet9, args: {width: 16}}\n")
    assert load_config(above, typed)[0].model.args == args
    above.write_text("base: base.yaml\nmodel: {name: resnet9}\n")
    assert load_config(above)[0].model.args == {}


def test_a_mistake_in_the_base_names_the_base(tmp_path):
    write(tmp_path, "\nsed: 1", "base.yaml")
    assert refusal(write(tmp_path, "base: base.yaml")).startswith("base.yaml:2: sed: no such key")


@pytest.mark.parametrize(
    "value", ["a: b", "a #b", "two words", "图片/猫 和 狗", "*.jpg", "&a", "!x", "a, b", "x=y", "%"]
)
def test_a_word_on_the_command_line_is_taken_as_it_is(value):
    assert load_config(None, [f"data.root={value}"])[0].data.root == value


def test_lists_mappings_and_quoted_text_come_on_the_command_line_as_yaml():
    words = ["data.augment=[crop, flip]", "data.args={a: [1, x]}", "run='my run'", "data.tag=null"]
    cfg, _ = load_config(None, words)
    assert (to_dict(cfg)["data"]["augment"], cfg.data.args) == (["crop", "flip"], {"a": [1, "x"]})
    assert (cfg.run, cfg.data.tag) == ("my run", None)


def test_a_list_takes_mappings_with_keys_that_may_be_left_out(tmp_path):
    text = "data:\n  augment: [flip, {name: crop}, {name: resized_crop, scale: [0.2, 1]}]"
    cfg, _ = load_config(write(tmp_path, text))
    crop = {"name": "resized_crop", "scale": [0.2, 1.0]}
    assert [change.name for change in cfg.data.augment] == ["flip", "crop", "resized_crop"]
    assert to_dict(cfg)["data"]["augment"] == ["flip", "crop", crop]
    assert "  augment: [flip, crop, {name: resized_crop, scale: [0.2, 1.0]}]" in to_yaml(cfg)
    assert load_config(write(tmp_path, to_yaml(cfg)))[0] == cfg
    assert load_config(None, base=to_dict(cfg))[0] == cfg, "as it comes out of a checkpoint"
    assert load_config(None, ["data.augment=[{name: crop}]"]) == load_config(
        None, ["data.augment=[crop]"]
    )


def test_an_empty_file_and_empty_sections_give_the_defaults(tmp_path):
    assert load_config(write(tmp_path, ""))[0] == Config()
    assert load_config(write(tmp_path, "\ufeff# mine\noptim:\ndata: {}\n"))[0] == Config()


def test_defaults_are_not_shared_between_configurations():
    assert Config().data.args is not Config().data.args


def test_replaced_changes_what_it_is_told_and_nothing_else():
    cfg = with_values(Config(), run="a", train={"epochs": 3})
    assert cfg.run == "a" and cfg.train.epochs == 3
    assert with_values(cfg, run=None, train={"epochs": Config().train.epochs}) == Config()


FILES = [path.name for path in RunLogs(Path()).paths()]
FILES += [name + ending for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())]


@pytest.mark.parametrize("name", [*FILES, "archive", OWNER, ".run.lock"])
def test_no_run_can_be_called_as_what_a_run_leaves(name):
    with pytest.raises(Refused, match="run: expected a name"):
        load_config(None, [f"run={name.replace('*', '001')}"])


def test_a_name_that_a_checkpoint_has_from_before_is_kept():
    assert load_config(None, base={"run": "v1.csv"})[0].run == "v1.csv"


@pytest.mark.parametrize("name", ["archived", "my.run-2", "config", "-1", "pth"])
def test_a_run_may_be_called_what_no_file_is(name):
    assert load_config(None, [f"run={name}"])[0].run == name


def test_checking_the_configuration_imports_no_torch():
    code = (
        "import sys, cnn.config; from pathlib import Path;"
        "cnn.config.load_config(Path('configs/config.yaml'));"
        "print([name for name in ('torch', 'numpy', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
