"""configs/schema.json: what editors know of the settings is what the loader takes."""

import json
from pathlib import Path

import jsonschema
import pytest
from conftest import RECIPES, ROOT

from cnn.config import Config, load_config, schema, to_yaml
from cnn.config.reader import compose
from cnn.config.settings import keys_of
from cnn.config.values import plain_value
from cnn.errors import Refused
from cnn.records.best_hparams import update

FILES = [*RECIPES, ROOT / "tests/tiny.yaml"]
VALIDATOR = jsonschema.Draft7Validator(json.loads(schema.FILE.read_text(encoding="utf-8")))


def mistakes(text: str) -> list[str]:
    """What the schema says of a file. PyYAML would take 1e-3 for text, editors do not."""
    return [error.message for error in VALIDATOR.iter_errors(plain_value(compose(text, "file")))]


def test_the_file_is_what_the_dataclasses_say():
    assert schema.FILE.read_text(encoding="utf-8") == schema.text(), (
        "run: python -m cnn.config.schema"
    )


def test_it_is_a_schema_and_knows_every_key_with_its_meaning_and_default():
    jsonschema.Draft7Validator.check_schema(schema.schema())
    for key, field in keys_of(Config):
        entry = schema.schema()
        for part in key.split("."):
            entry = entry["properties"][part]
        assert entry["description"].startswith(field.metadata["description"]), key
        VALIDATOR.evolve(schema=entry).validate(entry["default"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_shipped_are_valid_and_tell_the_editor(path):
    text = path.read_text(encoding="utf-8")
    assert not mistakes(text)
    if path.parent.name == "configs":
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    printed = to_yaml(load_config(path)[0])
    assert not mistakes(printed), "with every key that there is"


def test_the_best_settings_left_by_runs_are_valid(tmp_path):
    folder = tmp_path / "configs/best_hparams"
    best = {"metric": "val_acc", "value": 0.9, "epoch": 3}
    for value in (0.9, 0.95):  # the second has the first in its history
        path = update(
            folder, Config(), best | {"value": value}, {"val_acc": value}, {"test_acc": 1}
        )
    text = path.read_text(encoding="utf-8")
    assert "history:\n- monitor" in text and not mistakes(text)
    assert text.startswith("# yaml-language-server: $schema=../schema.json\n")


RIGHT = [
    "",
    "base: config.yaml\ndata:\noptim: {}",
    "run: 2024\ndata: {tag: 1, root: ../照片, args: null, augment: null}",
    "data: {name: 'my.code:load', augment: [flip, mine:change], in_memory: auto}",
    "loss: {class_weights: [1, 2.5e-3], name: mine:Loss}\noptim: {weight_decay: 0}",
    "loss: {class_weights: balanced}\nmodel: {args: {width: 4, deep: {er: [1, x]}}}",
    "optim: {lr: 1e-3, groups: [{match: fc, lr_scale: 0}], freeze: ^layer, freeze_epochs: 3}",
    "device: cuda:1\nschedule: {name: multistep, milestones: [3, 6]}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_loader_takes_is_valid(text, tmp_path):
    Path("my.yaml").write_text(text.replace("base: config.yaml", ""), encoding="utf-8")
    load_config(Path("my.yaml"))
    document = compose(text, "file")
    assert not mistakes(text) if document else True


WRONG = [
    "optim: {lrr: 1}",
    "optimizer: {lr: 1}",
    "epochs: 3",
    "seed: -1",
    "seed: 1.5",
    "seed: [1]",
    "device: gpu",
    "device: 3",
    "data: digits",
    "data: {name: minst}",
    "data: {batch_size: 0}",
    "data: {batch_size: '16'}",
    "data: {val_fraction: 1}",
    "data: {augment: crop}",
    "data: {augment: [crop, flop]}",
    "data: {sampler: weighted}",
    "data: {download: 1}",
    "data: {args: 3}",
    "data: {channels: 4}",
    "loss: {class_weights: [1, -1]}",
    "loss: {class_weights: even}",
    "loss: {label_smoothing: 1}",
    "optim: {lr: 0}",
    "optim: {lr: null}",
    "optim: {groups: [{match: fc}]}",
    "optim: {groups: [{match: fc, lr_scale: -1}]}",
    "optim: {groups: [{match: fc, lr_scale: 1, lr: 2}]}",
    "optim: {freeze_epochs: -1}",
    "train: {precision: fp8}",
    "train: {epochs: true}",
    "checkpoint: {monitor: acc}",
    "schedule: [cosine]",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_the_loader_refuses_is_invalid(text):
    Path("my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match="my.yaml:1: "):
        load_config(Path("my.yaml"))
    assert mistakes(text)
