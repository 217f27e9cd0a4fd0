"""One fact, one place: what settings.py names, a table of another room has, and nothing else."""

import dataclasses
import importlib.util
import inspect

import pytest
import torch
from conftest import ROOT

from cnn.config import code_keys, load_config, settings
from cnn.config.settings import ASKED, FIXED, FREE, Config, LogConfig, for_scratch, keys_of
from cnn.datasets.augment import AUGMENTATIONS
from cnn.datasets.build import DATASETS
from cnn.datasets.torchvision_datasets import FILES
from cnn.metrics import scores
from cnn.metrics.running import EvaluationMetrics
from cnn.models.build import MODELS
from cnn.training.losses import LOSSES
from cnn.training.optim import OPTIMIZERS
from cnn.training.schedule import SCHEDULES
from cnn.training.setup import build_run
from cnn.training.state import PLAIN_ATTRIBUTES
from cnn.utils.importing import OURS, import_object

TABLES = {
    "DATA_NAMES": DATASETS,
    "KNOWN_DATASETS": FILES,
    "AUGMENTATIONS": AUGMENTATIONS,
    "LOSSES": LOSSES,
    "MODEL_NAMES": MODELS,
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULES": SCHEDULES,
}


@pytest.mark.parametrize("names", TABLES)
def test_the_names_in_the_settings_are_those_of_the_table(names):
    named, table = set(getattr(settings, names)), set(TABLES[names])
    assert not named - table, f"in settings.{names}, and not in the table"
    assert not table - named, f"in the table, and not in settings.{names}"


def test_every_argument_of_an_augmentation_is_a_setting_and_an_argument_of_its_function():
    fields = {field.name for field in dataclasses.fields(settings.AugmentationConfig)}
    taken = {name for names in settings.AUGMENTATIONS.values() for name in names}
    assert taken | {"name", "args"} == fields
    for name, arguments in settings.AUGMENTATIONS.items():
        function = AUGMENTATIONS[name][0]
        function = import_object(function, "") if isinstance(function, str) else function
        assert set(arguments) <= inspect.signature(function).parameters.keys(), name


def test_every_metric_has_a_better_side_and_what_can_be_monitored_is_measured():
    monitored = {name.removeprefix("val_") for name in settings.MONITORED}
    assert monitored | {scores.TOP_K_ACC} == set(scores.HIGHER + scores.LOWER)
    assert [scores.mode(f"val_{name}") for name in scores.LOWER] == ["min"] * len(scores.LOWER)
    for number in (2, scores.MIN_CLASSES_FOR_TOP_K):
        names = scores.result_metrics(number)
        evaluation_metrics = EvaluationMetrics(torch.device("cpu"), number, names)
        labels = torch.arange(2 * number) % number
        logits = torch.randn(2 * number, number, generator=torch.Generator().manual_seed(0))
        evaluation_metrics.add(torch.tensor(1.0), logits, labels)
        values = evaluation_metrics.compute()
        assert values.keys() == set(names) and None not in values.values()
    assert set(scores.result_metrics(2)) | set(names) == set(scores.HIGHER + scores.LOWER)


def test_every_setting_says_what_it_means():
    for key, field in keys_of(Config):
        meta = field.metadata
        assert meta["description"] and meta["resume"] in (FREE, ASKED, FIXED), key


def test_a_setting_says_nothing_that_nobody_reads():
    with pytest.raises(AssertionError, match="expected"):
        settings.setting(0, "a number", FREE, lest=1)


def test_a_scratch_run_writes_nothing_beside_its_folder():
    """A logger that is added under log. says what it is there, or this fails."""
    short = for_scratch(dataclasses.replace(Config(), run="a"))
    assert short.run is None
    for field in dataclasses.fields(LogConfig):
        if field.name != "every_seconds":
            assert field.metadata["scratch"] is not ..., f"log.{field.name}: scratch=..."
            assert not getattr(short.log, field.name), field.name


def test_what_is_logged_makes_no_other_experiment():
    assert {f"log.{field.name}" for field in dataclasses.fields(LogConfig)} <= set(
        settings.non_experiment_keys()
    )
    fixed = {key for key, rule in settings.resume_rules().items() if rule == FIXED}
    assert not fixed & settings.non_experiment_keys()


def test_the_keys_that_may_name_code_are_known():
    names = ["data.name", "data.augment", "model.name", "loss.name", "optim.name", "log.trackers"]
    assert code_keys() == names


def test_what_is_ours_cannot_be_named_as_code_by_a_file():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts | {"cnn", "tests", "bench"} == set(OURS)
    assert all(importlib.util.find_spec(name) for name in scripts)


# What a run's state has beside the plain values: saved under other names, or live parts of the run.
OTHERWISE = {
    "model",
    "optimizer",
    "schedule",
    "scaler",
    "loss",
    "ema",
    "running_metrics",
    "batch",
    "seconds",
}
OTHERWISE |= {"epochs_since_best", "device"}


def test_what_changes_during_a_run_is_saved():
    """An attribute that is added to the state stands in PLAIN_ATTRIBUTES, or is named here."""
    run = build_run(load_config(None, [])[0])
    assert set(vars(run.state)) == OTHERWISE | set(PLAIN_ATTRIBUTES)
    saved = run.state.state_dict()
    assert set(PLAIN_ATTRIBUTES) <= saved.keys()


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("in_memory", ["auto", False])
def test_every_augmentation_changes_images_wherever_they_come_from(name, in_memory):
    run = build_run(load_config(None, [f"data.augment=[{name}]", f"data.in_memory={in_memory}"])[0])
    loader, images = run.train_loader, run.data.train
    changed = [not loader.image((1, index)).equal(images[index]) for index in range(60)]
    assert sum(changed) > 15
