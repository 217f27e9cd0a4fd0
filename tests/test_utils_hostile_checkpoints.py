"""Files from strangers: forty broken or hostile checkpoints, each refused, and nothing executed."""

import ast
import builtins
import codecs
import dataclasses
import operator
import os
import pickle
import re
import runpy
import subprocess
import tarfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import (
    FIRST_FORMAT,
    MARKER,
    changed,
    content,
    hostile,
    rezipped,
    saved,
    with_pickle,
)
from conftest import ROOT
from PIL import Image
from torch import nn

import evaluate as evaluate_script
import export as export_script
import predict as predict_script
import train as train_script
from cnn.config import Config, code_keys
from cnn.config.settings import keys_of
from cnn.errors import Refused
from cnn.training.resume import check_code
from cnn.utils.checkpoint import read_metadata
from cnn.utils.importing import is_outside_code

TOUCH = f"open({str(MARKER)!r}, 'w').close()"


def real() -> bytes:
    return FIRST_FORMAT.read_bytes()


def names_code(key: str, value: object, args: dict) -> Callable[[], bytes]:
    """A checkpoint whose settings name code to run."""

    def change(tree: dict) -> None:
        section, name = key.split(".")
        tree["config"][section] |= {name: value, "args": args}

    return lambda: changed(change)


def tar() -> bytes:
    Path("a.txt").write_text("a")
    with tarfile.open("a.tar", "w") as archive:
        archive.add("a.txt")
    return Path("a.tar").read_bytes()


def whole_model() -> bytes:
    return saved(nn.Linear(2, 2))


def numpy_file() -> bytes:
    np.savez("a.npz", weights=np.ones(3))
    return Path("a.npz").read_bytes()


def bomb() -> bytes:
    """Zeros that a zip program would blow up to a gigabyte."""
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(100):
                member.write(bytes(1_000_000))
        archive.writestr("archive/version", "3\n")
    return Path("bomb.zip").read_bytes()


def nested(depth: int) -> Callable[[dict], None]:
    def change(tree: dict) -> None:
        for _ in range(depth):
            tree["environment"] = {"precision": "fp32", "in": tree["environment"]}

    return change


def laughs(tree: dict) -> None:
    """Ten lists of ten lists of ten lists ...: a few bytes, and endless to walk."""
    inner = ["ha"] * 10
    for _ in range(30):
        inner = [inner] * 10
    tree["environment"]["joke"] = inner


def claims_more() -> bytes:
    """A storage that says it has a thousand times what its member has."""
    with zipfile.ZipFile(FIRST_FORMAT) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    return with_pickle(pickled.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00cpu", 1).replace(
        b"K\x02t", b"J\x00\x00\x00\x10t", 1))  # fmt: skip


FILES: dict[str, Callable[[], bytes]] = {
    # code that an unpickler without care would run
    "os.system": lambda: hostile(os.system, f"touch {MARKER}"),
    "eval": lambda: hostile(builtins.eval, f"[{TOUCH}]"),
    "exec": lambda: hostile(builtins.exec, TOUCH),
    "subprocess": lambda: hostile(subprocess.Popen, ["touch", str(MARKER)]),
    "runpy": lambda: hostile(runpy.run_path, "mine.py"),
    "getattr": lambda: hostile(operator.attrgetter, "system"),
    "open": lambda: hostile(builtins.open, str(MARKER), "w"),
    "codecs": lambda: hostile(codecs.encode, "a", "rot13"),
    "torch.hub": lambda: hostile(torch.hub.load, "a/b", "c"),
    "torch.load": lambda: hostile(torch.load, "mine.pth"),
    "a pickle, no zip": lambda: pickle.dumps(builtins.exec, protocol=2),
    "old format of torch": lambda: saved(content(), _use_new_zipfile_serialization=False),
    "stack global": lambda: with_pickle(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R."),
    "inst": lambda: with_pickle(b"(S'touch executed'\nios\nsystem\n."),
    "a whole model": whole_model,
    # settings that name code
    "loss.name": names_code("loss.name", "subprocess:Popen", {"args": ["touch", str(MARKER)]}),
    "data.name": names_code("data.name", "subprocess:Popen", {"args": "ls"}),
    "model.name": names_code("model.name", "runpy:run_path", {"path_name": "mine.py"}),
    "data.augment": lambda: changed(
        lambda tree: tree["config"]["data"].update(augment=["flip", "os:remove"])
    ),
    "our own code": names_code("loss.name", "train:main", {"argv": ["loss.name=os:system"]}),
    # memory and time
    "bytearray": lambda: hostile(bytearray, 10**12),
    "deflated bomb": bomb,
    "claims more than it holds": claims_more,
    "expanded tensor": lambda: changed(
        lambda tree: tree["model_state_dict"].update(a=torch.ones(1).expand(10**9, 10**3))
    ),
    "deep": lambda: changed(nested(200)),
    "a billion laughs": lambda: changed(laughs),
    "a huge number": lambda: changed(lambda tree: tree.update(step=10**4000)),
    "a huge number for a key": lambda: with_pickle(
        b"\x80\x02}\x8b" + (3000).to_bytes(4, "little") + b"\x7f" * 3000 + b"Ns."
    ),
    "truncated pickle": lambda: with_pickle(b"\x80\x02}q\x00("),
    "a pickle of nothing": lambda: with_pickle(b""),
    # other files
    "empty": lambda: b"",
    "text": lambda: b"hello\n" * 100,
    "zeros": lambda: bytes(20_000),
    "numpy": numpy_file,
    "tar": tar,
    "zip of something": lambda: rezipped(replace={"data.pkl": b"no pickle"}),
    "compressed": lambda: rezipped(compression=zipfile.ZIP_DEFLATED),
    "weights alone": lambda: saved(content()["model_state_dict"]),
    "cut": lambda: real()[:-1],
    "flipped": lambda: real()[:5000] + bytes([real()[5000] ^ 1]) + real()[5001:],
    "something after it": lambda: real() + b"\n",
    "twice": lambda: real() + real()[1:],
    "newer": lambda: changed(lambda tree: tree.update(format=2)),
    "settings that are none": lambda: changed(lambda tree: tree.update(config={"optim": 3})),
    "settings with numbers for keys": lambda: changed(lambda tree: tree.update(config={1: 2})),
    "other classes": lambda: changed(lambda tree: tree.update(classes=["a", "b"])),
    "other data": lambda: changed(lambda tree: tree["data"].update(train=3)),
    "predictions that are none": lambda: changed(lambda tree: tree.update(predictions=[1])),
    "learning rates that are none": lambda: changed(lambda tree: tree.update(group_lrs=5)),
    "data that is none": lambda: changed(lambda tree: tree.update(data={})),
}


SCRIPTS: dict[str, Callable[[], int]] = {
    "train.py": lambda: train_script.main(["--resume", "mine.pth"]),
    "evaluate.py": lambda: evaluate_script.main(["--checkpoint", "mine.pth"]),
    "predict.py": lambda: predict_script.main(["a.png", "--checkpoint", "mine.pth"]),
    "export.py": lambda: export_script.main(["--checkpoint", "mine.pth", "--format", "weights"]),
}
PREPROCESSING = {"image_size": 8, "channels": 1, "mean": [0.5], "std": [1.0]}
USES = ("predict.py", "export.py")
NO_MATTER = ("other data",)  # what a resume would train on is nothing to them


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of zipfile, and of torch while it saves
def test_a_hostile_or_broken_file_is_refused_and_not_executed(request, capfd, make):
    Path("mine.py").write_text(TOUCH)
    Path("mine.pth").write_bytes(make())
    Image.new("L", (8, 8)).save("a.png")
    for name, script in SCRIPTS.items():
        status, said = script(), capfd.readouterr().err
        if name in USES and request.node.callspec.id in NO_MATTER:
            assert status == 0
            continue
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1, f"{name}: {said}"
        assert "Traceback" not in said and "weights_only" not in said, f"{name}: {said}"
        assert "mine.pth" in said
        assert not MARKER.exists(), name


# Hostile only to what uses the settings or the tensors.
DESCRIBED = {
    *("loss.name", "data.name", "model.name", "data.augment", "our own code", "expanded tensor"),
    *("settings that are none", "other classes", "other data", "learning rates that are none"),
    *("predictions that are none", "claims more than it holds"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_of_a_hostile_file_are_refused_and_nothing_is_executed(name):
    Path("mine.py").write_text(TOUCH)
    Path("mine.pth").write_bytes(FILES[name]())
    try:
        assert read_metadata(Path("mine.pth"))["epoch"] == 2
        assert name in DESCRIBED
    except Refused as refusal:
        assert str(refusal).startswith("mine.pth: ") and "\n" not in str(refusal)
    assert not MARKER.exists()


def test_metadata_of_a_pickle_that_numbers_its_values_from_two_billion_are_refused():
    """Python's unpickler would reserve memory for as many."""
    Path("mine.pth").write_bytes(with_pickle(b"\x80\x02}r\xff\xff\xff\x7f."))
    with pytest.raises(Refused, match="numbers that are too large"):
        read_metadata(Path("mine.pth"))


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessing": {}},
        {"preprocessing": {"image_size": 8, "channels": 1, "mean": [0.5], "std": [0.0]}},
        {"preprocessing": {"image_size": 8, "channels": 1, "mean": [0.5], "std": ["a"]}},
        {"preprocessing": {"image_size": -8, "channels": 1, "mean": [0.5], "std": [1.0]}},
        {"preprocessing": {"image_size": 8, "channels": 3, "mean": [0.5], "std": [1.0]}},
        {"preprocessing": PREPROCESSING | {"value_range": [0, float("nan")]}},
        {"preprocessing": PREPROCESSING | {"value_range": [0, float("inf")]}},
        {"preprocessing": PREPROCESSING | {"value_range": [4095, 0]}},
        {"preprocessing": PREPROCESSING | {"value_range": [0]}},
        {"preprocessing": PREPROCESSING | {"value_range": "a"}},
        {"preprocessing": PREPROCESSING | {"value_range": {}}},
        {"model_state_dict": {"a": torch.ones(3)}},
        {"model_state_dict": {}},
        {"classes": []},
        {"class_weights": "balanced"},
        {"class_weights": [1.0]},
    ],
    ids=str,
)
def test_what_evaluation_and_prediction_rest_on_is_checked_before(capfd, change):
    Path("mine.pth").write_bytes(changed(lambda tree: tree.update(change)))
    Image.new("L", (8, 8)).save("a.png")
    for name in ("evaluate.py", *USES):
        status, said = SCRIPTS[name](), capfd.readouterr().err
        if name in USES and change.get("class_weights") == [1.0]:
            assert status == 0
            continue
        assert status == 2 and "mine.pth: " in said and "Traceback" not in said, f"{name}: {said}"


def test_weights_of_another_precision_are_refused_which_torch_would_convert(capfd):
    def widen(tree: dict) -> None:
        tree["model_state_dict"] = {
            name: tensor.double() for name, tensor in tree["model_state_dict"].items()
        }

    Path("mine.pth").write_bytes(changed(widen))
    Image.new("L", (8, 8)).save("a.png")
    for name in ("evaluate.py", "predict.py"):
        assert SCRIPTS[name]() == 2
        assert "mine.pth: its weights do not fit its model" in capfd.readouterr().err


@pytest.mark.parametrize("make", ["folder", "pipe", "device", "nothing", "loop"])
def test_what_is_no_file_is_refused(train, capfd, make):
    path = Path("/dev/zero" if make == "device" else "odd.pth")
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "loop":
        path.symlink_to(path)
    Image.new("L", (8, 8)).save("a.png")
    for script in (
        lambda: train("--resume", str(path)),
        lambda: evaluate_script.main(["--checkpoint", str(path)]),
        lambda: predict_script.main(["a.png", "--checkpoint", str(path)]),
    ):
        assert script() == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: {path}: ") and "Traceback" not in said


def test_there_are_forty_of_them():
    assert len(FILES) + 5 >= 40


@pytest.mark.parametrize(
    "file, named", [("os.system", "posix.system"), ("bytearray", "bytearray"), ("eval", "eval")]
)
def test_the_message_names_what_the_file_would_call(train, capfd, file, named):
    Path("mine.pth").write_bytes(FILES[file]())
    assert train("--resume", "mine.pth") == 2
    assert re.search(rf"has no use for \(.*{named}\); not opened", capfd.readouterr().err)


def test_only_modules_of_ones_own_folder_are_taken_from_a_checkpoint(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in (
        "train:main",
        "cnn.utils.files:write_text",
        "os:system",
        "json:loads",
        "yaml:load",
    ):
        assert is_outside_code(name), name


def test_weights_of_a_damaged_file_are_refused(train, capfd):
    Path("w.pth").write_bytes(FILES["flipped"]())
    assert train("model.weights=w.pth", "model.args={width: 2}") == 2
    assert "model.weights: w.pth: damaged: the checksum" in capfd.readouterr().err


def test_code_of_ones_own_resumes_without_typing_it_again(train):
    Path("ours.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))\n"
    )
    assert train("model.name=ours:Net", "model.args={}", "train.epochs=1") == 0
    assert train("--resume", "train.epochs=3") == 0


def test_code_of_others_resumes_where_it_is_typed(train, capfd):
    words = ["loss.name=torch.nn:CrossEntropyLoss", "train.epochs=1"]
    assert train(*words) == 0
    assert train("--resume", "train.epochs=3") == 2
    assert "type loss.name=torch.nn:CrossEntropyLoss" in capfd.readouterr().err
    assert train("--resume", "train.epochs=3", words[0]) == 0


def forms_of(key: str, name: str) -> Iterator[object]:
    """The ways in which a setting may name code, as deep as its lists and mappings go."""
    field = dict(keys_of(Config))[key]
    kind, known = field.type, next(iter(field.metadata["choices"]), "flip")
    if typing.get_origin(kind) is not list:
        yield name
        return
    (item,) = typing.get_args(kind)
    yield [known, name]
    for below, field in keys_of(item) if dataclasses.is_dataclass(item) else ():
        if field.metadata["names_code"]:
            yield ["flip", {below: name}]


@pytest.mark.parametrize("key", code_keys())
def test_every_key_that_may_name_code_is_refused_from_a_file_unless_typed(key, capfd):
    section, _, name = key.partition(".")
    forms = list(forms_of(key, "os:remove"))
    assert forms
    for form in forms:
        tree = content()
        tree["config"][section][name] = form
        Path("mine.pth").write_bytes(saved(tree))
        assert train_script.main(["--resume", "mine.pth"]) == 2
        said = capfd.readouterr().err
        assert f"mine.pth: {key}: names code outside this folder, os:remove" in said, form
        check_code(Path("mine.pth"), tree["config"], typed={key})  # typed, it is taken


def test_every_setting_whose_word_is_imported_is_known_to_name_code():
    """Every `import_object(name, "section.key")` of the package, and what code_keys() knows."""
    used = set()
    for path in (ROOT / "cnn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_object":
                used.add(node.args[1].value)
    assert used == set(code_keys())
