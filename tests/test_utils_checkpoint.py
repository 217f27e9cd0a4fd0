"""A checkpoint is never torn and never silently wrong: every flip, every cut, every odd content."""

import contextlib
import io
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from archives import FIRST_DRAWS, FIRST_FORMAT, changed, content, rezipped, saved
from PIL import Image

import evaluate as evaluate_script
import predict as predict_script
from cnn.drill.differences import differences
from cnn.errors import Refused
from cnn.utils.checked_zip import write_archive
from cnn.utils.checkpoint import (
    FORMAT,
    STRUCTURE_HASH,
    clone_tree,
    estimate_bytes,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from cnn.utils.checkpoint_structure import KEYS


def written(name: str) -> bytes:
    """A real checkpoint's bytes: as we write it, or as torch.save does where a user saves again."""
    if name == "saved again":
        return saved(content())
    if name == "first format":
        return FIRST_FORMAT.read_bytes()
    file = io.BytesIO()
    write_archive(content(), file)
    return file.getvalue()


def outcome(data: bytes, original: dict) -> str:
    """refused, equal or different: what becomes of a file with these bytes."""
    path = Path("damaged.pth")
    path.write_bytes(data)
    try:
        loaded = load_checkpoint(path)
    except Refused as refusal:
        assert str(refusal).startswith("damaged.pth: ") and "\n" not in str(refusal)
        return "refused"
    return "different" if list(differences(original, loaded)) else "equal"


def flip(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def soak(name: str, flips: int, cuts: int) -> dict[str, dict[str, int]]:
    data, draw = written(name), random.Random(5)
    original = content()
    counts = {kind: dict.fromkeys(("refused", "equal", "different"), 0) for kind in ("flip", "cut")}
    for _ in range(flips):
        counts["flip"][outcome(flip(data, draw), original)] += 1
    for _ in range(cuts):
        counts["cut"][outcome(data[: draw.randrange(len(data))], original)] += 1
    print(f"{name}: {counts}")
    return counts


@pytest.mark.parametrize("name", ["ours", "first format"])
def test_a_damaged_file_never_loads_as_something_else(name):
    counts = soak(name, flips=400, cuts=60)
    assert counts["flip"] == {"refused": 400, "equal": 0, "different": 0}
    assert counts["cut"] == {"refused": 60, "equal": 0, "different": 0}


def test_a_file_saved_again_by_hand_is_held_against_its_members_checksums():
    counts = soak("saved again", flips=150, cuts=30)
    assert counts["flip"]["different"] == 0 and counts["flip"]["refused"] > 75
    assert counts["cut"] == {"refused": 30, "equal": 0, "different": 0}


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ours", "first format", "saved again"])
def test_ten_thousand_flips_and_a_thousand_cuts(name):
    counts = soak(name, flips=10_000, cuts=1_000)
    assert counts["flip"]["different"] == counts["cut"]["different"] == counts["cut"]["equal"] == 0
    if name != "saved again":
        assert counts["flip"]["equal"] == 0


def test_every_byte_of_the_headers_counts():
    """Those that no CRC covers, of the first and of the last members and in the directory."""
    data, original = written("ours"), content()
    for position in [*range(0, 200, 7), *range(len(data) - 1500, len(data), 11)]:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        assert outcome(bytes(damaged), original) == "refused", position


def test_what_is_written_is_an_ordinary_file_of_torch_save(tmp_path):
    path = tmp_path / "again.pth"
    save_checkpoint(content(), path)
    for mmap in (False, True):
        opened = torch.load(path, weights_only=True, mmap=mmap)
        opened.pop(STRUCTURE_HASH)
        assert not list(differences(content(), opened))
    assert not list(differences(content(), load_checkpoint(path)))


def test_a_file_of_the_first_format_resumes(train):
    """format_1.pth: `train.py --config tests/tiny.yaml train.epochs=4 model.args={width: 2}
    checkpoint.every_epochs=2`, its epoch_002.pth."""
    Path("checkpoints").mkdir()
    shutil.copy(FIRST_FORMAT, "checkpoints/last.pth")
    before = content()
    assert before["format"] == 1 and before["epoch"] == 2
    assert train("--resume") == 0
    after = load_checkpoint(Path("checkpoints/last.pth"))
    assert after["epoch"] == 4 and after["history"][:2] == before["history"]


def test_a_file_of_before_the_draws_had_a_number_resumes_and_says_so_once(train, capfd):
    """draws_1.pth, see tests/data/README.md."""
    Path("checkpoints").mkdir()
    shutil.copy(FIRST_DRAWS, "checkpoints/last.pth")
    before = load_checkpoint(FIRST_DRAWS)
    assert "draws" not in before and before["epoch"] == 2
    assert train("--resume") == 0
    said = capfd.readouterr().err
    assert said.count("drawn in a new way since this file was written (draws 1 → 3)") == 1
    after = load_checkpoint(Path("checkpoints/last.pth"))
    assert after["draws"] == 3 and after["epoch"] == 4
    assert after["history"][:2] == before["history"]
    assert train("--resume", "train.epochs=5") == 0
    assert "drawn in a new way" not in capfd.readouterr().err


def test_a_file_of_before_the_draws_had_a_number_evaluates_and_predicts(capfd):
    checkpoint = ["--checkpoint", str(FIRST_DRAWS)]
    assert evaluate_script.main([*checkpoint, "--split", "val"]) == 0
    said = capfd.readouterr()
    assert "training reported" in said.out
    if "the same figures" not in said.out:  # another torch or CPU rounds otherwise
        assert "equal up to rounding" in said.out
    Image.new("RGB", (8, 8)).save("a.png")
    assert predict_script.main(["a.png", *checkpoint]) == 0
    assert "pattern" in capfd.readouterr().out


def test_a_setting_younger_than_the_file_is_held_to_its_default(train, capfd):
    Path("checkpoints").mkdir()
    shutil.copy(FIRST_FORMAT, "checkpoints/last.pth")
    assert "sampler" not in content()["config"]["data"]
    assert train("--resume", "data.sampler=balanced") == 2
    assert "data.sampler  shuffle     balanced  cannot change" in capfd.readouterr().err


# -- metadata without tensors ----------------------------------------------------------------------


def large(megabytes: int) -> Path:
    """A checkpoint of about that size, most of it one tensor of the optimizer."""
    tree = content()
    tree["optimizer_state_dict"]["state"]["large"] = torch.zeros(megabytes * 250_000)
    path = Path("large.pth")
    save_checkpoint(tree, path)
    return path


@pytest.mark.parametrize("name", ["ours", "first format", "saved again"])
def test_metadata_are_the_plain_values_of_the_checkpoint(name):
    path = Path("a.pth")
    path.write_bytes(written(name))
    found, whole = read_metadata(path), load_checkpoint(path)
    for key in ("started", "epoch", "step", "config", "classes", "best", "history", "environment"):
        assert found[key] == whole[key], key
    assert found["unfinished_epoch"]["batch"] == whole["unfinished_epoch"]["batch"]
    assert not any("state_dict" in key for key in found)


def test_metadata_do_not_depend_on_the_tensors_data_and_take_no_time_for_it():
    path = large(megabytes=200)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for position in range(size // 4, 3 * size // 4, size // 16):
            file.seek(position)
            file.write(b"\xff")
    with pytest.raises(Refused, match="large.pth: damaged: the checksum"):
        load_checkpoint(path)
    began = time.process_time()
    found = read_metadata(path)
    assert time.process_time() - began < 0.1, "reading all of it takes longer"
    assert (found["epoch"], found["step"]) == (2, 8)


@pytest.mark.parametrize("name", ["ours", "first format", "saved again"])
def test_metadata_of_a_damaged_file_are_refused_or_right(name):
    data, draw, path = written(name), random.Random(7), Path("damaged.pth")
    path.write_bytes(data)
    original, refused = read_metadata(path), 0
    damaged = [flip(data, draw) for _ in range(200)]
    for number, part in enumerate(
        [*damaged, *(data[: draw.randrange(len(data))] for _ in "x" * 40)]
    ):
        path.write_bytes(part)
        try:
            assert read_metadata(path) == original, number
            assert number < 200, "cut off"
        except Refused as refusal:
            assert str(refusal).startswith("damaged.pth: ") and "\n" not in str(refusal)
            refused += 1
    assert refused > 80


def test_metadata_of_what_is_no_checkpoint_are_refused():
    for make, _ in CONTENTS.values():
        Path("odd.pth").write_bytes(make())
        with contextlib.suppress(Refused):  # what is wrong in a tensor alone is not seen
            assert read_metadata(Path("odd.pth"))["epoch"] == 2
    for change in ({"step": -1}, {"started": 3}, {"unfinished_epoch": {}}, {"epoch": "2"}, {1: 2}):
        Path("odd.pth").write_bytes(changed(lambda tree, change=change: tree.update(change)))
        with pytest.raises(Refused, match=f"odd.pth: {next(iter(change))}"):
            read_metadata(Path("odd.pth"))


def replace(tree: dict, key: str, value: object) -> None:
    *sections, last = key.split("/")
    for section in sections:
        tree = tree[section]
    tree[last] = value


def spoil(tree: dict) -> None:
    next(iter(tree["model_state_dict"].values())).view(-1)[0] = float("nan")


def circle(tree: dict) -> None:
    tree["environment"]["itself"] = tree["environment"]


CONTENTS = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"epoch,loss\n1,0.3\n" * 9, "not a checkpoint: the file does not begin as"),
    "weights alone": (lambda: saved(content()["model_state_dict"]), "say model.weights=odd.pth"),
    "exported weights": (
        lambda: saved({"model_state_dict": content()["model_state_dict"], "classes": ["a", "b"]}),
        "say model.weights=odd.pth",
    ),
    "a list": (lambda: saved([1, 2]), "expected a checkpoint of train.py, got list"),
    "a tensor": (lambda: saved(torch.ones(2)), "got a tensor float32 (2,)"),
    "another program's": (lambda: saved({"state_dict": {}, "epoch": 3}), "format, step, started"),
    "a missing key": (lambda: changed(lambda tree: tree.pop("step")), "all of one: step missing"),
    "newer": (lambda: changed(lambda tree: tree.update(format=FORMAT + 1)), "newer version"),
    "no format": (lambda: changed(lambda tree: tree.update(format="1")), "format: expected a whole"),
    "NaN": (lambda: changed(spoil), "holds values that are no numbers (NaN)"),
    "a negative step": (lambda: changed(lambda tree: tree.update(step=-1)), "step: expected a whole number of at least 0, got -1"),
    "a step of text": (lambda: changed(lambda tree: tree.update(step="4")), "step: expected a whole number of at least 0, got str"),
    "a batch of float": (
        lambda: changed(lambda tree: replace(tree, "unfinished_epoch/batch", 1.0)),
        "unfinished_epoch.batch: expected a whole number of at least 0, got 1.0",
    ),
    "history of numbers": (
        lambda: changed(lambda tree: tree.update(history=[1])),
        "history[0]: expected a mapping, got 1",
    ),
    "weights that are no tensors": (
        lambda: changed(lambda tree: tree.update(model_state_dict={"a": 1})),
        "model_state_dict.a: expected a tensor, got 1",
    ),
    "a circle": (lambda: changed(circle), "not a tree of plain values"),
    "a tensor larger than its file": (
        lambda: changed(
            lambda tree: replace(tree, "data/huge", torch.ones(1).expand(2_000_000, 1_000))
        ),
        "data.huge: expected a plain tensor, got one whose numbers overlap in memory",
    ),
    "compressed members": (lambda: rezipped(compression=8), "is compressed"),
    "a member twice": (lambda: rezipped(twice="data.pkl"), "a member twice"),
}  # fmt: skip


@pytest.mark.parametrize("make, expected", CONTENTS.values(), ids=CONTENTS)
def test_what_is_no_whole_checkpoint_is_refused_by_name(make, expected):
    path = Path("odd.pth")
    path.write_bytes(make())
    with pytest.raises(Refused) as refused:
        load_checkpoint(path)
    assert str(refused.value).startswith("odd.pth: ") and expected in str(refused.value)
    assert "there is no other file beside it" in str(refused.value)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_needed_and_of_its_kind(key):
    path = Path("odd.pth")
    path.write_bytes(changed(lambda tree: tree.update({key: 1.5j if key == "lr" else {1, 2}})))
    with pytest.raises(Refused):
        load_checkpoint(path)
    path.write_bytes(changed(lambda tree: tree.pop(key)))
    with pytest.raises(Refused, match=f"{key} missing"):
        load_checkpoint(path)


def weight(tree: dict) -> tuple[dict, str]:
    weights = tree["model_state_dict"]
    return weights, next(name for name, tensor in weights.items() if tensor.ndim > 1)


def other_shape(tree: dict) -> None:
    weights, name = weight(tree)
    weights[name] = (
        weights[name][:, :1].clone() if weights[name].shape[1] > 1 else weights[name][1:]
    )


def other_dtype(tree: dict) -> None:
    weights, name = weight(tree)
    weights[name] = weights[name].double()


def other_momentum(tree: dict) -> None:
    memory = tree["optimizer_state_dict"]["state"]
    memory[0]["momentum_buffer"] = memory[0]["momentum_buffer"].flatten()


def momentum_of_nobody(tree: dict) -> None:
    tree["optimizer_state_dict"]["state"][99] = {"momentum_buffer": torch.ones(3)}


@pytest.mark.parametrize("change", [other_shape, other_dtype, other_momentum, momentum_of_nobody])
def test_tensors_that_do_not_fit_the_model_are_refused(train, capfd, change):
    Path("odd.pth").write_bytes(changed(change))
    assert train("--resume", "odd.pth") == 2
    said = capfd.readouterr().err
    assert "error: odd.pth: does not fit the model or optimizer as configured: " in said
    assert "Traceback" not in said


def test_the_message_names_another_file_of_the_run_that_is_whole():
    Path("run").mkdir()
    for name in ("last.pth", "best.pth"):
        Path("run", name).write_bytes(FIRST_FORMAT.read_bytes()[:-1])
    shutil.copy(FIRST_FORMAT, "run/epoch_002.pth")
    whole = "run/epoch_002.pth is whole (after epoch 2, step 8): --resume run/epoch_002.pth"
    for path in ("run/last.pth", "run/nothing.pth", "run"):
        with pytest.raises(Refused) as refused:
            load_checkpoint(Path(path))
        assert whole in str(refused.value)


def test_weights_that_have_become_nan_are_not_saved(train, capfd, monkeypatch):
    from cnn.training.state import TrainingState

    assert train("train.epochs=1") == 0
    good = Path("checkpoints/last.pth").read_bytes()
    original = TrainingState.end_step

    def blow_up(state: TrainingState, *args) -> None:
        next(state.model.parameters()).data.view(-1)[0] = float("nan")
        original(state, *args)

    monkeypatch.setattr(TrainingState, "end_step", blow_up)
    assert train("--resume", "train.epochs=3", "checkpoint.every_steps=1") == 1
    said = capfd.readouterr().err
    assert "is no longer a number: epoch 2, step 5" in said and "Traceback" not in said
    assert Path("checkpoints/last.pth").read_bytes() == good


def test_the_space_a_save_needs_is_estimated_within_a_third():
    estimate, true = estimate_bytes(clone_tree(content())), len(FIRST_FORMAT.read_bytes())
    assert true / 1.5 < estimate < true * 1.5
