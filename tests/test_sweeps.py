"""sweep.py: what is read and refused; that no trial is lost or run twice, whatever is killed when."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

import optuna
import pytest
from conftest import ROOT, TINY, assert_same_run, history
from optuna.trial import TrialState
from processes import CONTEXT, run
from sweeping import STAND_IN, Sweeping, hold_one_after_the_other, sweeping

import sweep as script
from cnn import config
from cnn.config import to_dict
from cnn.errors import Refused
from cnn.records import best_hparams, run_record
from cnn.sweeps import locks
from cnn.sweeps import trial as trial_module
from cnn.sweeps.settings import load_sweep
from cnn.sweeps.study import Study, TrialResult
from cnn.sweeps.trial import run_trial
from cnn.utils.signals import StopSignals

SHIPPED = ROOT / "configs/sweep.yaml"
LR = "space: {optim.lr: {log: [1e-3, 0.5]}}"


def write(text: str, name: str = "small.yaml") -> Path:
    """A sweep's file, of tests/tiny.yaml."""
    path = Path(name)
    path.write_text(f"config: {TINY[1]}\n{text}\n", encoding="utf-8")
    return path


def refusal(text: str, *words: str) -> str:
    with pytest.raises(Refused) as caught:
        load_sweep(write(text), words)
    return str(caught.value)


# -- what is read -------------------------------------------------------------------------------


def test_the_file_shipped_is_a_sweep_of_digits_that_downloads_nothing():
    sweep = load_sweep(SHIPPED)
    assert (sweep.name, sweep.trials, sweep.cfg.search) == ("digits", 12, "tpe")
    assert sweep.base.data.name == "digits" and sweep.base.train.epochs == 12
    assert [str(dimension) for dimension in sweep.space.values()] == [
        *("log 0.005 to 0.5", "0.7 to 0.98", "[32, 64, 128]")
    ]


def test_another_model_than_that_of_the_common_file_has_not_its_arguments():
    words = "search: grid\nspace: {optim.lr: [0.1, 0.2]}\n"
    assert load_sweep(write(words)).base.model.args == {"width": 4, "dropout": 0.3}
    another = load_sweep(write(words + "settings: {model.name: resnet20}\n"))
    assert (another.base.model.name, another.base.model.args) == ("resnet20", {})


def test_all_mistakes_are_told_at_once_each_with_its_line():
    said = refusal("""search: gird
trails: 3
seed: -1
settings: {train.epoch: 2, optim: {momentum: 2}}
space:
  optim.lrr: [1]
  optim.lr: {log: [0, 1]}
  optim.weight_decay: {between: [1, 0]}
  optim.name: [sgd, adamv]
  data.batch_size: {log: [0.5, 3]}
  data.sampler: {between: [a, b]}
  data.limit: [10, 10]
  data.augment: crop
  loss.label_smoothing: {range: [0, 1]}
  train: {epochs: [1]}
  run: [a, b]
optim.lr: 3""")
    expected = {
        2: "search: expected one of grid, random, tpe, got gird — did you mean 'grid'?",
        3: "trails: no such key — did you mean 'trials'?",
        4: "seed: expected a whole number of at least 0 and at most 4294967295, got -1",
        5: "train.epoch: no such key — did you mean 'train.epochs'?",
        7: "optim.lrr: no such key — did you mean 'optim.lr'?",
        8: "optim.lr.log: expected a number above 0, got 0",
        9: "optim.weight_decay.between: expected [low, high] with low below high, got [1.0, 0.0]",
        10: "optim.name[1]: expected one of sgd, adam, adamw, nadam, radam, rmsprop, adagrad,"
        " adamax, package.module:name, got adamv — did you mean 'adam'?",
        11: "data.batch_size.log: expected a whole number of at least 1, got 0.5",
        12: "data.sampler: is not a number; expected [a, b, ...]",
        13: "data.limit[1]: given twice",
        14: "data.augment: expected [a, b, ...], {between: [low, high]} or {log: [low, high]},"
        " got crop",
        15: "loss.label_smoothing: expected [a, b, ...], {between: [low, high]} or"
        " {log: [low, high]}, got {range}",
        16: "train: is a section; write train.KEY: [a, b, ...], {between: [low, high]} or"
        " {log: [low, high]}",
        17: "run: cannot be tried: each trial has a run of its own",
        18: "optim.lr: no such key",
    }
    lines = said.splitlines()
    for number, words in expected.items():
        assert f"small.yaml:{number}: {words}" in lines
    assert (
        "small.yaml:5: optim.momentum: expected a number of at least 0 and below 1, got 2" in lines
    )
    assert "small.yaml: trials: expected the number of trials for tpe, got null" in lines
    assert len(lines) == len(expected) + 2


@pytest.mark.parametrize(
    "text, words, expected",
    [
        ("trials: 3", [], "small.yaml: space: expected lines such as"),
        (LR, [], "small.yaml: trials: expected the number of trials for tpe, got null"),
        (LR, ["search=grid"], "small.yaml:2: optim.lr: expected [a, b, ...] for a grid"),
        ("space: {seed: [0, 1]}", ["search=grid", "trials=2"], "trials: expected null, since a grid tries all, got 2"),
        (f"trials: 1\n{LR}", ["optim.lr=3"], "command line: optim.lr: is in space too"),
        (f"trials: 1\nsettings: {{run: a}}\n{LR}", [], "small.yaml:3: run: cannot be set"),
        (f"name: a/b\ntrials: 1\n{LR}", [], "small.yaml:2: name: expected letters"),
        (f"trials: 1\n{LR}", ["data.rot=x"], "data.rot: no such key — did you mean 'data.root'?"),
        (LR, ["trails=3"], "command line: trails: no such key — did you mean 'trials'?"),
        (
            "trials: 1\nspace: {data.sampler: [shuffle, balanced], loss.class_weights: [balanced]}",
            [],
            "small.yaml:3: loss.class_weights: balanced cannot go with data.sampler: balanced",
        ),
        (
            "search: grid\nspace: {schedule.name: [cosine, multistep]}",
            [],
            "schedule.milestones: missing; multistep needs the epochs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(text, words, expected):
    assert expected in refusal(text, *words)


def test_a_configuration_that_is_not_there_or_spoilt_is_told_with_the_rest():
    Path("small.yaml").write_text(f"config: nothing.yaml\n{LR}\n")
    with pytest.raises(
        Refused, match=r"1: config: expected a file beside .*\n.*trials: expected the number"
    ):
        load_sweep(Path("small.yaml"))
    Path("nothing.yaml").write_text("optim: {lrr: 3}\n")
    with pytest.raises(
        Refused, match=r"trials: expected the number.*\nnothing.yaml:1: optim.lrr: no such key"
    ):
        load_sweep(Path("small.yaml"))


def test_a_grid_has_every_combination_once_and_what_is_typed_reads_back_the_same():
    text = """search: grid
space:
  data.augment: [[], [crop, flip]]
  model.args: [{width: 4, names: [a, '1']}, {}]
  optim.clip: [1]""".replace("  optim.clip: [1]", "  train.clip_grad_norm: [null, 1e-3]")
    sweep = load_sweep(write(text))
    assert sweep.trials == 8
    with Study(sweep) as study:
        seen = []
        while (trial := study.take(StopSignals())) is not None:
            with trial:
                trial.start()
                _, path, *words = trial.arguments()
                cfg, _ = script.load_config(Path(path), words)
                assert cfg.run == f"small_{len(seen):04}"
                found = to_dict(cfg)["data"]["augment"], cfg.model.args, cfg.train.clip_grad_norm
                assert list(found) == list(trial.values.values())
                seen.append(found)
                study.end(trial.number, TrialResult(TrialState.COMPLETE, 1.0, 1))
    assert seen == [
        (augment, args, norm)
        for augment in ([], ["crop", "flip"])
        for args in ({"width": 4, "names": ["a", "1"]}, {})
        for norm in (None, 1e-3)
    ]


def test_without_optuna_it_says_what_to_install(monkeypatch, capfd):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main([str(SHIPPED)]) == 2
    assert capfd.readouterr().err == (
        "error: sweep.py needs optuna: pip install -r requirements-sweep.txt\n"
    )


def test_a_typo_is_answered_without_torch_or_optuna():
    code = "import sys, sweep; sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- which trials there are, whoever dies -------------------------------------------------------


def trials_of(name: str = "small", url: str | None = None) -> list:
    storage = optuna.storages.RDBStorage(url or f"sqlite:///logs/sweeps/{name}/study.db")
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials()
    finally:
        storage.engine.dispose()


def begun() -> list:
    return [json.loads(line) for line in Path("begun.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> list[dict]:
    """What a sweep proposes that nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("unbroken"))
        write(f"trials: 2\n{LR}")
        process = sweeping()
        process.join(60)
        assert process.exitcode == 0
        return [trial.params for trial in trials_of()]


def test_killed_before_and_after_every_write_it_comes_to_the_same_trials(unbroken):
    write(f"trials: 2\n{LR}")
    deaths = [dies_at for _ in range(9) for dies_at in range(9)]  # in each round some get further
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold_one_after_the_other, args=(Path.cwd(), deaths, there))
    process.start()
    assert here.poll(100), "hangs"
    *kills, end = here.recv()
    assert kills == [-signal.SIGKILL] * len(kills) and end == 0 and len(kills) > 8
    trials = trials_of()
    assert [trial.params for trial in trials] == unbroken
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    words = Counter(json.dumps(entry) for entry in begun())
    assert sorted(json.loads(entry)[0] for entry in words) == [f"small_{n:04}" for n in range(2)]


def test_a_trial_ends_with_a_sweep_that_is_killed_and_the_next_one_goes_on_with_it():
    """The second sweep begins while the run of the first, told by nobody, is about to save."""
    script = Path("stand_in.py").resolve()
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{STAND_IN}")
    write(f"trials: 2\n{LR}")
    first = sweeping(script=script)
    deadline = time.monotonic() + 60
    while not Path("begun.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    second = sweeping(script=script)
    second.join(60)
    assert second.exitcode == 1, "no trial came to an end"
    (one, words), (other, again), (last, _) = begun()
    assert one == other == "small_0000" and words == again and last == "small_0001"
    assert "waiting for the run of trial 0" in Path("logs/sweeps/small/sweep.log").read_text()


def test_many_processes_some_of_them_killed_share_the_trials_and_none_is_lost_or_run_twice():
    write(f"trials: 6\nsearch: random\n{LR}")
    for deaths in ((7, 16), (None, None)):
        processes = [sweeping(dies_at=dies_at) for dies_at in deaths]
        for process, dies_at in zip(processes, deaths, strict=True):
            process.join(60)
            assert process.exitcode == (0 if dies_at is None else -signal.SIGKILL)
    trials = trials_of()
    assert [trial.number for trial in trials] == list(range(6))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len({trial.params["optim.lr"] for trial in trials}) == 6
    times = Counter(name for name, _ in begun())
    assert len(times) == 6 and sum(times.values()) <= 6 + 2  # those that were killed, again


def test_machines_without_a_common_disk_share_the_trials_by_the_database_alone():
    url = f"sqlite:///{Path.cwd()}/common.db"
    machines = [Path("one").resolve(), Path("other").resolve()]
    for machine in machines:
        machine.mkdir()
        write(f"trials: 4\nstorage: {url}\n{LR}", f"{machine.name}/small.yaml")
    killed = sweeping(folder=machines[0], dies_at=15)  # in a trial, which the other waits for
    killed.join(60)
    (broken,) = [t for t in trials_of(url=url) if t.state == TrialState.RUNNING]
    file = machines[1] / f"logs/sweeps/small/trials/{broken.number:04}.lock"
    file.parent.mkdir(parents=True)
    file.write_text("it wanted the trial too, and came too late")
    other = sweeping(folder=machines[1])
    while sum(trial.state == TrialState.COMPLETE for trial in trials_of(url=url)) < 3:
        assert other.is_alive()
        time.sleep(0.5)
    time.sleep(0.3)
    assert other.is_alive() and trials_of(url=url)[broken.number].state == TrialState.RUNNING
    again = sweeping(folder=machines[0])
    for process in (again, other):
        process.join(60)
        assert process.exitcode == 0
    trials = trials_of(url=url)
    assert [trial.state for trial in trials[:4]] == [TrialState.COMPLETE] * 4
    assert trials[broken.number].params == broken.params
    names = [json.loads(line)[0] for machine in machines
             for line in (machine / "begun.txt").read_text().splitlines()]  # fmt: skip
    assert len(set(names)) == 4 and len(names) <= 5


def test_a_trial_that_cannot_be_brought_to_an_end_may_be_skipped(capfd):
    write(f"trials: 2\n{LR}")
    sweep = load_sweep(Path("small.yaml"))
    with Study(sweep) as study:
        with study.take(StopSignals()), pytest.raises(Refused, match="trial 0 is being trained"):
            study.skip(0)
        study.skip(0)
        with pytest.raises(Refused, match="expected a trial that is not finished, got 0"):
            study.skip(0)
        with study.take(StopSignals()) as taken:
            assert taken.number == 1
    skipped = trials_of()[0]
    assert skipped.state == TrialState.FAIL
    assert skipped.user_attrs["reason"] == "left out by --skip"


def test_a_trial_of_an_earlier_version_with_an_id_in_its_lock_file_is_resumed():
    with Study(load_sweep(write(f"trials: 1\n{LR}"))) as study:
        attributes = {"taken": "an id"}
        study.study.add_trial(optuna.create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        study.lock_file(0).write_text("an id")
        with study.take(StopSignals()) as trial:
            assert trial.number == 0 and len(study.trials()) == 1


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.RUNNING])
def test_a_trial_of_an_earlier_version_that_nobody_had_signed_for_is_taken(state):
    """It waited, or its process was killed between taking it and storing its id."""
    with Study(load_sweep(write(f"trials: 1\n{LR}"))) as study:
        study.study.add_trial(optuna.create_trial(state=state))
        if state == TrialState.RUNNING:
            study.lock_file(0).write_text("")
        with study.take(StopSignals()) as trial:
            trial.start()
            assert trial.number == 0 and study.frozen(0).state == TrialState.RUNNING


def test_a_trial_that_was_refused_is_there_again_and_takes_nothing_from_an_earlier_run():
    write(f"trials: 1\n{LR}")
    Path("logs/small_0000").mkdir(parents=True)
    Path("logs/small_0000/train.log").write_text("2001-02-03 04:05:06 an earlier run\n")
    with Study(load_sweep(Path("small.yaml"))) as study:
        with pytest.raises(Refused), study.take(StopSignals()) as trial:
            trial.start()
            values = trial.values
            Path("logs/small_0000/train.log").write_text("this run\n")
            raise Refused("no such data")
        with study.take(StopSignals()) as trial:
            trial.start()
            assert trial.is_resumed and (trial.number, trial.values) == (0, values)
    assert Path("logs/small_0000/train.log").read_text() == "this run\n"
    (archived,) = Path("logs/small_0000/archive").glob("*/train.log")
    assert archived.parent.name == "2001-02-03_04-05-06"


def test_a_sweep_that_was_begun_otherwise_does_not_go_on_and_more_trials_do():
    with Study(load_sweep(write(f"trials: 2\n{LR}"))):
        pass
    for text, said in [
        ("settings: {train.epochs: 3}", "train.epochs  2     3"),
        ("search: random", "search  tpe   random"),
    ]:
        with (
            pytest.raises(Refused, match=said),
            Study(load_sweep(write(f"{text}\ntrials: 2\n{LR}"))),
        ):
            pass
    with Study(load_sweep(write(f"trials: 3\nprune_after_epochs: 1\n{LR}"), ["device=cpu"])):
        pass


def test_a_database_that_is_none_is_refused(capfd):
    for url in ("nonsense", "sqlite:////nowhere/at/all.db", "oracle+none://a:secret@b/c"):
        assert script.main([str(write(f"trials: 1\n{LR}")), f"storage={url}"]) == 2
        said = capfd.readouterr().err
        assert "storage: the database cannot be opened: " in said and "secret" not in said
        assert said.count("\n") == 1


# -- one trial ----------------------------------------------------------------------------------


def own_lock() -> IO[bytes] | None:
    Path("logs").mkdir(exist_ok=True)
    return locks.acquire(Path("logs/a.lock"))


class StandaloneTrial:
    """A trial without a study."""

    run, monitor, output = "a", "val_loss", Path("logs/a.txt")

    def __init__(self, words: list[str], report: Callable, lock: IO[bytes]):
        self.words, self.lock, self._report, self.epoch = words, lock, report, 0

    def arguments(self) -> list[str]:
        return self.words

    def should_prune(self) -> bool:
        return False

    def report(self, epoch: int, value: float) -> bool:
        if epoch <= self.epoch:
            return False
        self.epoch = epoch
        return self._report(epoch, value)


def training(words: list[str], report=lambda epoch, value: False, lock=None) -> TrialResult:
    """A real one."""
    trial = StandaloneTrial([*TINY, *words, "run=a"], report, lock or own_lock())
    try:
        return run_trial(trial, StopSignals(deferred=True))
    finally:
        trial.lock.close()


def test_a_trial_that_is_worse_than_the_median_is_stopped_and_saved():
    reported, lock = [], own_lock()

    def report(epoch: int, value: float) -> bool:
        reported.append((epoch, value))
        if epoch == 3:
            lock.close()  # as if we were killed
            assert own_lock() is None, "the training has it still"
        return epoch >= 3

    assert training(["train.epochs=100000"], report, lock).state == TrialState.PRUNED
    own_lock().close()
    assert [epoch for epoch, _ in reported] == [1, 2, 3]
    assert [f"{value:g}" for _, value in reported] == [
        f"{float(row['val_loss']):g}" for row in rows_of("a")[:3]
    ]
    assert "stopped by SIGTERM" in Path("logs/a/train.log").read_text()
    assert Path("checkpoints/a/last.pth").exists()


def rows_of(name: str) -> list[dict]:
    Path("whole").mkdir(exist_ok=True)
    if not Path("whole", name).exists():
        Path("whole", name).mkdir()
        Path("whole", name, "logs").symlink_to(Path("logs", name).resolve())
    return history(Path("whole", name))


def test_the_median_decides_on_a_worse_trial_and_spares_the_better():
    with Study(
        load_sweep(write(f"trials: 6\nprune_after_epochs: 2\nsettings: {{train.epochs: 4}}\n{LR}"))
    ) as study:
        for value in (0.5, 0.6, 0.4, 0.7):
            with study.take(StopSignals()) as trial:
                trial.start()
                assert not any(trial.report(epoch, value) for epoch in (1, 2, 3))
                study.end(trial.number, TrialResult(TrialState.COMPLETE, value, 3))
        for value, expected in ((0.54, [False, False, False]), (0.58, [False, True, True])):
            with study.take(StopSignals()) as trial:
                trial.start()
                assert [trial.report(epoch, value) for epoch in (1, 2, 3)] == expected
                study.end(trial.number, TrialResult(TrialState.PRUNED, epoch=3))
        assert [trial.number for trial in study.ranking()] == [2, 0, 1, 3]


def test_a_trial_that_fails_and_one_that_is_refused_say_why():
    failed = training(["optim.lr=1e9", "train.epochs=100"])
    assert failed.state == TrialState.FAIL and "is no longer a number: epoch " in failed.reason
    with pytest.raises(Refused, match="optim.lrr: no such key.*did you mean 'optim.lr'"):
        training(["optim.lrr=1"])  # told before torch is imported


@pytest.mark.soak
def test_a_trial_whose_process_is_killed_goes_on_by_itself_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(trial_module, "MAX_KILLED", 2)
    killed = []

    def report(epoch: int, value: float) -> bool:
        owner = json.loads(Path("checkpoints/a/.run.json").read_text())
        if epoch > 1 and owner["process"] not in killed:
            killed.append(owner["process"])
            os.kill(owner["process"], signal.SIGKILL)
        return False

    outcome = training(["train.epochs=100000"], report)
    assert outcome.state == TrialState.FAIL and outcome.reason.startswith(
        "ended by SIGKILL, 2 times"
    )
    assert len(killed) == 2 and Path("logs/a/train.log").read_text().count("resumed from") == 1


# -- the whole ----------------------------------------------------------------------------------


def check_that_each_was_run_once(name: str, number: int, url: str | None = None) -> list:
    """Holds the database against the runs; gives the complete trials, the best first."""
    trials = trials_of(name, url)
    assert [trial.number for trial in trials] == list(range(number))
    assert all(trial.state.is_finished() for trial in trials)
    names = [f"{name}_{n:04}" for n in range(number)]
    assert sorted(path.name for path in Path("logs").glob(f"{name}_*")) == names
    complete = []
    for trial, run_name in zip(trials, names):
        log = Path("logs", run_name, "train.log").read_text()
        assert log.count("a new run starts") == 1 and not Path("logs", run_name, "archive").exists()
        record = run_record.read_run(f"logs/{run_name}")
        assert {key: record.settings[key] for key in trial.params} == trial.params
        if trial.state == TrialState.COMPLETE:
            assert record.status == "finished" and record.best()[record.monitor] == trial.value
            complete.append(trial)
    return sorted(complete, key=lambda trial: trial.value)


def check_best_settings(name: str, best) -> None:
    (path,) = Path("configs/best_hparams").glob("*.yaml")
    cfg, _ = config.load_config(path)
    settings = config.flat(config.to_dict(cfg))
    assert {key: settings[key] for key in best.params} == best.params
    assert best_hparams.best_result(path) == ("val_loss", best.value)


@pytest.mark.soak  # also in .ci/run
def test_two_processes_one_killed_and_one_stopped_bring_every_trial_to_its_end_once():
    epochs = 40
    write(f"trials: 3\nsettings: {{train.epochs: {epochs}}}\n{LR}")
    killed, stopped = Sweeping("small.yaml"), Sweeping("small.yaml")
    first = killed.wait_for_epochs(3, "small")
    killed.kill(signal.SIGKILL)  # its training lives on, and the trial is not free before that ends
    last = Sweeping("small.yaml")
    second = stopped.wait_for_epochs(3, "small")
    stopped.kill(signal.SIGTERM)
    assert stopped.process.returncode == 128 + signal.SIGTERM and first != second
    assert "warning: stopped by SIGTERM; the same command resumes" in stopped.wait()
    said = last.wait()
    assert last.process.returncode == 0
    assert f"trial {second} resumes: " in said
    # On a busy machine, the training that lived on has ended by itself before the others looked.
    assert f"trial {first} resumes: " in said or "1 done before" in said
    ranking = check_that_each_was_run_once("small", 3)
    assert len(ranking) == 3
    check_best_settings("small", ranking[0])
    assert "sweep small is done: 3 complete\n" in said
    assert "its settings: python train.py --config configs/best_hparams/" in said
    words = [f"optim.lr={trials_of()[second].params['optim.lr']!r}", f"train.epochs={epochs}"]
    assert run(Path("unbroken").resolve(), *TINY, *words)[0] == 0
    for kind in ("logs", "checkpoints"):
        Path("broken").mkdir(exist_ok=True)
        Path(kind, f"small_{second:04}").rename(Path("broken", kind))
    assert "resumed from" in Path("broken/logs/train.log").read_text()
    assert_same_run("unbroken", "broken")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_that_is_shipped_in_two_processes_that_are_killed_again_and_again(seed):
    draw = random.Random(seed)
    words = [str(SHIPPED), "prune_after_epochs=null"] if seed == 0 else [str(SHIPPED)]
    running = [Sweeping(*words) for _ in range(2)]
    kills = Counter()
    for _ in range(8):
        time.sleep(draw.uniform(0, 6))
        place = draw.randrange(2)
        if running[place].process.poll() is not None:
            break
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        at = running[place].trial()
        running[place].kill(number)
        with contextlib.suppress(
            OSError, ValueError, TypeError
        ):  # every second time its training too
            owner = json.loads(Path(f"checkpoints/digits_{at:04}/.run.json").read_text())
            if draw.random() < 0.5:
                os.kill(owner["process"], signal.SIGKILL)
                kills["training"] += 1
        kills[signal.Signals(number).name] += 1
        running[place] = Sweeping(*words)
    for process in running:
        process.wait()
        assert process.process.returncode == 0
    ranking = check_that_each_was_run_once("digits", 12)
    print(f"seed {seed}: {dict(kills)}; {len(ranking)} complete, best {ranking[0].value:.4f}")
    assert len(ranking) == 12 or seed != 0
    check_best_settings("digits", ranking[0])
