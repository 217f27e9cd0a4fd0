"""compare.py: what differs, by how much, and whether that is more than chance."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from processes import run

import compare as script
from cnn.records.figures import Curve, Panel, draw_panels, png, svg
from cnn.records.run_record import read_run
from compare import differing_settings, groups_of, verdict


def compare(*runs: str) -> int:
    return script.main(list(runs))


def test_six_runs_are_two_groups_with_the_right_difference(train, capsys):
    names = []
    for lr in (0.05, 0.0001):
        for seed in range(3):
            names.append(f"lr{lr}_seed{seed}")
            words = [f"run={names[-1]}", f"seed={seed}", f"optim.lr={lr}", "train.epochs=6"]
            assert train(*words, "data.args={num_images: 300, image_size: 8}") == 0
    runs = [read_run(name) for name in names]
    assert differing_settings(runs) == {
        "seed": [0, 1, 2] * 2,
        "optim.lr": [0.05] * 3 + [0.0001] * 3,
    }
    assert [len(group) for group in groups_of(runs)] == [3, 3]
    capsys.readouterr()
    assert compare(*names) == 0
    said = capsys.readouterr().out
    assert "optim.lr=0.05 is better: test_acc" in said
    settings = said.split("Settings that differ")[1].split("Groups")[0].split("\n")
    assert {line.split()[0] for line in settings if line} == {"setting", "seed", "optim.lr"}
    page = Path("logs/compare.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "")
    assert Path("logs/compare.png").read_bytes().startswith(b"\x89PNG")


VERDICTS = [
    ([0.90, 0.91, 0.92], [0.80, 0.81, 0.82], "test_acc", "a is better"),
    ([0.90, 0.91, 0.92], [0.80, 0.81, 0.82], "val_loss", "b is better"),
    ([0.90, 0.80, 0.70], [0.85, 0.75, 0.80], "test_acc", "do not differ by more than their spread"),
    ([0.90], [0.80, 0.81], "test_acc", "has no spread"),
    ([], [0.80], "test_acc", "no test_acc yet"),
]


@pytest.mark.parametrize("first, second, figure, expected", VERDICTS)
def test_a_verdict_weighs_the_difference_against_the_spread(first, second, figure, expected):
    assert expected in verdict(("a", "b"), (first, second), figure)


def test_a_running_a_broken_and_a_finished_run_are_set_side_by_side(tmp_path, capsys):
    words = [*TINY, "train.epochs=3", "checkpoint.every_steps=1"]
    assert run(tmp_path, *words, "run=done")[0] == 0
    for name, place, passes in (("broken", "validation", 8), ("early", "training", 0)):
        status, _ = run(tmp_path, *words, f"run={name}", trap=(place, passes, signal.SIGKILL))
        assert status == -signal.SIGKILL
    owner = {"process": os.getpid(), "machine": platform.node()}
    (tmp_path / "checkpoints/early/.run.json").write_text(json.dumps(owner))
    assert [read_run(n).status for n in ("done", "broken", "early")] == [
        *("finished", "broken off", "running")
    ]
    assert compare("done", "logs/broken", "early") == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if "/3 " in line}
    assert " 3/3 " in rows["done"] and " 0/3 " in rows["early"] and "n/a" in rows["early"]
    assert "none" in said.split("Settings that differ")[1]


def test_what_is_no_run_is_refused(capsys):
    assert compare("nowhere") == 2
    assert "nowhere: no run there" in capsys.readouterr().err


def test_it_needs_no_torch():
    code = "import sys, compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_compared(train, capsys):
    assert train("run=a", "train.epochs=1") == 0
    assert train("run=_b", "train.epochs=1", "seed=1") == 0
    Path("logs/broken").mkdir()
    Path("logs/broken/config.yaml").write_text("\x00")
    assert compare("a", "broken", "_b", "nowhere") == 1
    said = capsys.readouterr()
    assert "\na " in said.out and "\n_b " in said.out and Path("logs/compare.html").exists()
    assert "broken: cannot be read as a run" in said.err and "nowhere: no run there" in said.err
    assert compare("broken", "nowhere") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") >= 2 and "Traceback" not in said.err


def test_a_name_that_begins_with_an_underline_is_in_the_legend():
    curves = [Curve(label, [1, 2], [0.1, 0.2]) for label in ("_a", "b", None)]
    drawn = svg(draw_panels, [Panel("Loss", curves)])
    legend = drawn[drawn.index('id="legend') :]
    assert ">_a<" in legend.replace("> _a<", ">_a<") and ">b<" in legend
    assert legend.count("<text") == 2
    assert png(draw_panels, [Panel("Loss", curves)]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name, text", [("result.json", "[]"), ("history.csv", "epoch,step,l")])
def test_records_that_are_cut_off_are_named_and_the_others_compared(train, capsys, name, text):
    for run_name in ("a", "b"):
        assert train(f"run={run_name}", "train.epochs=1") == 0
    path = Path("logs/b", name)
    path.write_text(text if name == "result.json" else text + "\n1,2,3\n")
    capsys.readouterr()
    assert compare("a", "b") == 1
    said = capsys.readouterr()
    assert "b: cannot be read as a run" in said.err and "Traceback" not in said.err
    assert "test_acc" in said.out


def test_the_test_has_the_metric_that_is_monitored_with_its_interval(train, capsys):
    for run_name in ("a", "b"):
        assert train(f"run={run_name}", "train.epochs=1", "checkpoint.monitor=val_f1") == 0
    test = json.loads(Path("logs/a/result.json").read_text())["test"]
    capsys.readouterr()
    assert compare("a", "b") == 0
    said = capsys.readouterr().out
    low, high = test["test_f1_95"]
    assert "test_f1" in said
    assert f"{test['test_f1']:.4f} (95 %: {low:.4f} to {high:.4f})" in said
