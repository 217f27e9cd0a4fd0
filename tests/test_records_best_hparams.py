"""configs/best_hparams: the best of all runs, whoever writes when."""

from pathlib import Path

import pytest
import yaml
from conftest import history
from processes import CONTEXT

from cnn.config import load_config, with_values
from cnn.records.best_hparams import file_of, update

FOLDER = Path("configs/best_hparams")
TAGGED = ["model.name=mine:Net", "data.tag=A b", "run=first"]


def result(value: float, metric: str = "val_acc") -> tuple[dict, dict, dict]:
    """The best epoch, its metrics and the test's, as `update` takes them."""
    return {"metric": metric, "value": value, "epoch": 3}, {metric: value}, {"test_acc": value / 2}


def settings(*words: str):
    return load_config(None, words)[0]


def read() -> dict:
    (path,) = FOLDER.glob("*.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_file_is_named_for_model_data_and_tag():
    assert file_of(settings(), FOLDER).name == "simple_cnn_digits.yaml"
    assert file_of(settings(*TAGGED), FOLDER).name == "mine-Net_digits_A-b.yaml"


def test_a_better_result_replaces_it_and_a_worse_or_equal_one_does_not():
    assert update(FOLDER, settings("optim.lr=0.1"), *result(0.8))
    assert update(FOLDER, settings("optim.lr=0.2"), *result(0.9))
    for value in (0.9, 0.85, float("nan")):
        assert update(FOLDER, settings("optim.lr=0.3"), *result(value)) is None
    content = read()
    assert content["optim"]["lr"] == 0.2
    assert content["best_metrics"]["value"] == 0.9 and content["best_metrics"]["epoch"] == 3
    assert content["test_metrics"] == {"test_acc": 0.45} and content["updated_at"]
    (earlier,) = content["history"]
    assert earlier["value"] == 0.8 and earlier["settings"] == {"optim.lr": 0.1}


def test_of_losses_the_lower_one_is_better():
    update(FOLDER, settings(), *result(0.5, "val_loss"))
    assert update(FOLDER, settings(), *result(0.6, "val_loss")) is None
    assert update(FOLDER, settings(), *result(0.4, "val_loss"))


def test_a_result_by_another_metric_is_not_comparable(caplog):
    caplog.set_level("INFO")
    update(FOLDER, settings(), *result(0.5, "val_loss"))
    assert update(FOLDER, settings(), *result(0.99, "val_acc")) is None
    assert "is kept: it is the best by val_loss" in caplog.text


def test_config_takes_the_file_again_and_the_run_has_no_name():
    path = update(FOLDER, settings("run=first", "optim.lr=0.25"), *result(0.5))
    cfg, _ = load_config(path)
    assert cfg == settings("optim.lr=0.25")


def test_other_keys_are_still_refused(train, capfd):
    path = update(FOLDER, settings(), *result(0.5))
    path.write_text(path.read_text() + "best_metric: 1\n")
    assert train("--config", str(path)) == 2
    assert "best_metric: no such key" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "optim: {lr: 1}\n", "best_metrics: {value: x}\n"])
def test_a_file_that_is_something_else_is_left_as_it_is(text):
    path = file_of(settings(), FOLDER)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="left as it is"):
        update(FOLDER, settings(), *result(0.5))
    assert path.read_text() == text


def update_often(folder: Path, number: int) -> None:
    for step in range(3):
        value = ((number * 7 + step * 13) % 60) / 100
        update(folder, with_values(settings(), seed=number), *result(value))


def test_twenty_processes_at_once_keep_the_best_of_all():
    folder = Path.cwd() / "best"
    running = [CONTEXT.Process(target=update_often, args=(folder, n)) for n in range(20)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 20
    content = yaml.safe_load((folder / "simple_cnn_digits.yaml").read_text())
    values = {(n * 7 + s * 13) % 60 / 100: n for n in range(20) for s in range(3)}
    assert content["best_metrics"]["value"] == max(values)
    assert content["seed"] == values[max(values)]
    earlier = [entry["value"] for entry in content["history"]]
    assert earlier == sorted(earlier, reverse=True) and len(earlier) <= 10


def test_a_run_leaves_its_settings_and_the_next_one_trains_the_same_with_them(train):
    assert train("optim.lr=0.3") == 0
    first, content = history("."), read()
    assert content["optim"]["lr"] == 0.3 and "val_acc" in content["best_metrics"]["metrics"]
    assert content["test_metrics"].keys() >= {"test_acc", "test_auc", "test_ece"}
    assert train("--config", str(next(FOLDER.glob("*.yaml")))) == 0
    assert history(".") == first
    assert read() == content  # as good, not better


def test_dry_runs_and_drills_leave_none(train):
    assert train("--dry-run") == 0
    assert not Path("configs").exists()


def test_the_losses_of_two_functions_are_not_comparable(caplog):
    caplog.set_level("INFO")
    update(FOLDER, settings("loss.label_smoothing=0.1"), *result(0.5, "val_loss"))
    for other in ("loss.label_smoothing=0", "loss.name=torch.nn:MultiMarginLoss"):
        assert update(FOLDER, settings(other), *result(0.1, "val_loss")) is None
    assert "the best by val_loss of another loss" in caplog.text
    assert update(FOLDER, settings("loss.label_smoothing=0.1"), *result(0.4, "val_loss"))
    # An accuracy is one, whatever the loss.
    update(FOLDER, settings("data.tag=a", "loss.label_smoothing=0.1"), *result(0.5))
    assert update(FOLDER, settings("data.tag=a"), *result(0.6))
