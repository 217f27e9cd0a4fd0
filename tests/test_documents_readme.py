"""The READMEs keep their word: each command and snippet runs, each file and message is there.

README.md and README.zh-CN.md say the same: their headings, code, names and links are held together.
"""

import importlib.metadata
import inspect
import multiprocessing.spawn
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
import torchvision
from conftest import RECIPES, ROOT, assert_same_run
from PIL import Image
from processes import run_ranks
from test_datasets_sources import write_mnist

from cnn.datasets import workers
from cnn.drill import drill
from cnn.errors import ADVICE
from cnn.inference.predictor import load
from cnn.records import figures

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CLASSES = {"猫": 180, "汽车": 110, "船": 40}  # and how bright they are
FEW = ("model.name=simple_cnn", "log.report=false")

# ---------------------------------------------------------------------------------------------
# What is in a README


@dataclass(frozen=True)
class Part:
    """A heading with what follows up to the next one."""

    title: str
    level: int
    prose: str
    blocks: list[tuple[str, str]]  # language, code

    def names(self) -> set[str]:
        """What is set as code within the prose."""
        return set(re.findall(r"`([^`]+)`", self.prose))

    def links(self) -> list[str]:
        """Addresses, and files here; not places on the page, which are called after headings."""
        found = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", self.prose)
        return [one or other for one, other in found]


def parts(path: Path) -> list[Part]:
    found: list[Part] = []
    language, code = None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = re.fullmatch(r"```(\w*)", line)
        if language is not None and fence:
            found[-1].blocks.append((language, "\n".join(code) + "\n"))
            language, code = None, []
        elif language is not None:
            code.append(line)
        elif fence:
            language = fence[1]
        elif heading := re.fullmatch(r"(#+) (.+)", line):
            found.append(Part(heading[2], len(heading[1]), "", []))
        else:
            last = found.pop()
            found.append(Part(last.title, last.level, f"{last.prose}{line}\n", last.blocks))
    assert language is None, "a fence that is not closed"
    return found


def bare(language: str, code: str) -> str:
    """Without what is there to be read: comments, and of a list of files what they are."""
    if language == "text":
        lines = [line for line in code.splitlines()]
        return "\n".join(re.sub(r"(?<=[\w/])  +.*", "", line) for line in lines)
    return re.sub(r"(^|[ ]+)# .*$", "", code, flags=re.MULTILINE)


def the(title: str) -> Part:
    (found,) = [part for part in PARTS if part.title == title]
    return found


PARTS = parts(ENGLISH)


# ---------------------------------------------------------------------------------------------
# Two languages


def test_both_languages_say_the_same():
    both = list(zip(PARTS, parts(CHINESE), strict=True))
    for here, there in both:
        assert there.level == here.level, f"{here.title} / {there.title}"
        code = [[bare(*block) for block in part.blocks] for part in (here, there)]
        assert code[1] == code[0], f"{here.title}: other code"
        assert there.names() == here.names(), f"{here.title}: other names"
        languages = {ENGLISH.name, CHINESE.name}
        links = [sorted(set(part.links()) - languages) for part in (here, there)]
        assert links[1] == links[0], f"{here.title}: other links"
    assert CHINESE.name in both[0][0].links() and ENGLISH.name in both[0][1].links()


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_it_reads_as_it_is_meant_and_its_links_lead_somewhere(path):
    every = parts(path)
    assert not [p.title for p in every if re.search(r"^\d+\. ", p.prose, re.MULTILINE)], (
        "a line that begins with a number and a full stop is taken for a list"
    )
    for link in [link for part in every for link in part.links()]:
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    places = {re.sub(r"[^\w\s-]", "", part.title.lower()).replace(" ", "-") for part in every}
    named = {place for part in every for place in re.findall(r"\]\(#([^)]+)\)", part.prose)}
    assert named <= places, "as GitHub makes them of headings"


# ---------------------------------------------------------------------------------------------
# Commands and snippets


def draw(path: str, brightness: int, draw: np.random.Generator) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = brightness + draw.integers(-30, 30, (16, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """What a reader has who has come some way: recipes, images, MNIST's files, a trained model."""
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workshop"))
        patch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
        shutil.copytree(ROOT / "configs", "configs")
        shutil.rmtree("configs/best_hparams", ignore_errors=True)
        for name, brightness in CLASSES.items():
            for number in range(20):
                draw(f"photos/{name}/{number:02}.jpg", brightness, rng)
                draw(f"photos2/{name}/{number:02}.png", brightness, rng)
                draw(f"pictures/{name}_{number}.png", brightness, rng)
        for name in ("photo.jpg", "new_photos/a.jpg", "new_photos/b.jpg"):
            draw(name, CLASSES["船"], rng)
        Image.open("photo.jpg").resize((55, 40)).save("photo.jpg")  # to be resized and cut
        write_mnist(Path("data"), [number % 10 for number in range(40)])
        shutil.copy(ROOT / "cnn/models/simple_cnn.py", ".")
        run_python(patch, "train.py", "train.epochs=1", "log.report=false")
        few = ["train.epochs=1", *FEW]
        run_python(patch, "train.py", "--config", "configs/folder.yaml", "data.root=photos", *few)
        return Path.cwd()


@pytest.fixture
def scratch(workshop, monkeypatch) -> pytest.MonkeyPatch:
    """The workshop's things in the test's own folder."""
    shutil.copytree(workshop, ".", dirs_exist_ok=True)
    monkeypatch.syspath_prepend(".")
    before = set(sys.modules)
    yield monkeypatch
    for name in {"simple_cnn", *(name for name in sys.modules if name.startswith("examples"))}:
        if name not in before:
            sys.modules.pop(name, None)


def run_python(patch: pytest.MonkeyPatch, script: str, *words: str) -> int:
    """A script as it is run by its name, in this process; gives its exit status."""
    patch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return ended.value.code or 0


def a_script(patch: pytest.MonkeyPatch, script: str, rest: str) -> None:
    words = shlex.split(rest)
    fewer = []
    if script == "train.py":
        fewer = [f"train.epochs={2 if '--resume' in words else 1}", "log.report=false"]
    if script == "sweep.py":
        fewer = ["trials=1", "train.epochs=1"]
    if "configs/folds.yaml" in words:
        fewer = ["data.folds=2", "space={data.fold: [0, 1]}", "train.epochs=1", *FEW]
    if any("data.group" in word for word in words):
        for number, path in enumerate(sorted(Path("photos").glob("*/*.jpg"))):
            path.rename(path.with_name(f"patient{number // 2}_{path.name}"))
    if "--sensitivity" in words:  # of two classes
        shutil.rmtree("photos/船")
        two = ["--config", "configs/folder.yaml", "data.root=photos", "train.epochs=1", *FEW]
        assert run_python(patch, "train.py", *two) == 0
    if "configs/finetune.yaml" in words:
        fewer += ["data.image_size=32", "data.num_workers=0"]
        torch.save(torchvision.models.resnet18().state_dict(), "resnet18-f37072fd.pth")
    if "--drill" in words:  # more kills, and other hashes, are in test_drill.py
        patch.setattr(drill, "STOPS", drill.STOPS[1:2])
        patch.setattr(drill, "FRESH", drill.CONTEXT)
    assert run_python(patch, script, *words, *fewer) == 0


def a_list_for_a_script(patch: pytest.MonkeyPatch, lister: str, script: str, rest: str) -> None:
    listed = subprocess.run(lister, shell=True, capture_output=True, check=True).stdout
    assert listed.count(b"\n") > 20
    with open("list.txt", "wb") as file:
        file.write(listed)
    with open("list.txt", encoding="utf-8") as file:
        patch.setattr(sys, "stdin", file)
        a_script(patch, script, rest)


def an_installation(patch: pytest.MonkeyPatch, file: str, rest: str) -> None:
    """Of what is installed here; .ci/run does it where nothing is, and what comes after it."""
    for package in re.findall(r"^(\w+)>=", (ROOT / file).read_text(), flags=re.MULTILINE):
        assert importlib.metadata.version(package)
    installed_there = "requirements-dev.txt" + (ROOT / "requirements-dev.txt").read_text()
    assert file in installed_there
    by_ci = (ROOT / ".ci/run").read_text().splitlines()
    assert any("pip install" in line and "-r requirements-dev.txt" in line for line in by_ci)
    assert not rest or any(f"{line} ".startswith(f"{rest} ") for line in by_ci)


def tensorboard(patch: pytest.MonkeyPatch, rest: str) -> None:
    """Its own reading of the command line, and that there is something to show."""
    with warnings.catch_warnings(action="ignore"):  # of what it brings along
        from tensorboard.program import TensorBoard
    board = TensorBoard()
    board.configure(argv=["tensorboard", *shlex.split(rest)])
    assert list(Path(board.flags.logdir).rglob("*tfevents*"))


def the_schema(patch: pytest.MonkeyPatch) -> None:
    """Writes what is there already; other tests may be reading it just now."""
    written = {}
    patch.setattr(Path, "write_text", lambda path, text, **_: written.update({path: text}))
    patch.delitem(sys.modules, "cnn.config.schema", raising=False)  # whatever ran before
    runpy.run_module("cnn.config.schema", run_name="__main__")
    assert written == {ROOT / "configs/schema.json": (ROOT / "configs/schema.json").read_text()}


def several(patch: pytest.MonkeyPatch, options: str, rest: str) -> None:
    """As torchrun would start them; it itself is in test_training_distributed.py."""
    with warnings.catch_warnings(action="ignore"):
        known = torch.distributed.run.get_args_parser().parse_args(
            [*shlex.split(options), "train.py"]
        )
    words = shlex.split(rest)
    words += [f"train.epochs={2 if '--resume' in words else 1}", "log.report=false"]
    run_ranks(int(known.nproc_per_node), Path.cwd(), *words)
    assert "rank" not in Path("logs/train.log").read_text()


WAYS: list[tuple[str, Callable]] = [
    (r"python (\w+\.py)(?: (.*))?", a_script),
    (r"(find [^|]*) \| python (\w+\.py) (.*)", a_list_for_a_script),
    (r"pip install -r ([\w.-]+)(?: && (.*))?", an_installation),
    (r"torchrun (.*) train\.py(?: (.*))?", several),
    (r"nohup torchrun (.*) train\.py > run\.log 2>&1 &", lambda *args: several(*args, "")),
    (r"tensorboard (.*)", tensorboard),
    (r"python -m cnn\.config\.schema", the_schema),
]


def run_command(patch: pytest.MonkeyPatch, line: str) -> None:
    """Runs a line of a README in the one way there is; a line that has none is no command."""
    ways = [(match, act) for form, act in WAYS if (match := re.fullmatch(form, line))]
    assert len(ways) == 1, f"{line}: say in WAYS how it is tried"
    match, act = ways[0]
    act(patch, *(group or "" for group in match.groups()))


def check_snippet(code: str, said: dict, printed: str, apart: float = 0.0) -> None:
    """What a snippet came to is what the model says, but for what another decoding may change."""
    assert any(name in printed for name in CLASSES)
    predict = load("checkpoints/best.pth", "device=cpu", "train.precision=fp32")
    if "logits" in said and "images" in said:  # the weights alone, on images of its own
        images = (said["images"] - said["mean"]) / said["std"]
        with torch.no_grad():
            torch.testing.assert_close(said["logits"], predict.model(images))
    elif "probabilities" in said:
        answer = predict("photo.jpg")
        expected = [dict(zip(answer.classes, answer.probabilities))[n] for n in predict.classes]
        within = 5e-4 if "onnx" in code else 1e-6  # Pillow cuts before it resizes, and rounds
        assert said["probabilities"].tolist() == pytest.approx(expected, abs=within + apart)
    assert len(code.splitlines()) <= 20 and "cnn." not in re.sub(r"#.*|cnn\.inference", "", code)


@pytest.mark.parametrize("part", [p for p in PARTS if p.blocks], ids=lambda part: part.title)
def test_what_it_says_to_type_does_it(part, scratch, capfd):
    for language, code in part.blocks:
        if language == "sh":
            for line in bare(language, code).splitlines():
                run_command(scratch, line)
                capfd.readouterr()
        elif language == "python":
            names: dict = {}
            exec(code, names)  # noqa: S102  the README's own words
            check_snippet(code, names, capfd.readouterr().out)
        else:
            assert language == "text" or (language, part.title[:5]) == ("bash", "SLURM")


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_other_programs_prepare_a_picture_as_the_model_was_trained(fit, scratch, capfd):
    """A long one, also as JPEG, which predict.py decodes at half its size and the snippets in full.

    The probabilities then differ by up to 2e-4 here. Those of another fit differ by 1e-2.
    """
    words = [*FOLDER, *QUICK, f"data.fit={fit}", "data.image_size=32"]
    assert run_python(scratch, "train.py", *words) == 0
    snippets = [code for language, code in the("In other programs").blocks if language == "python"]
    coarse = np.random.default_rng(0).integers(0, 255, (18, 64, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((640, 180))  # with pad 9 pixels high: 23 are black
    for ending, code in zip(("pt2", "onnx"), reversed(snippets[:2])):
        assert run_python(scratch, "export.py", "--output", f"checkpoints/best.{ending}") == 0
        for form, apart in (("PNG", 0), ("JPEG", 5e-4)):
            photo.save("photo.jpg", form)
            names: dict = {}
            exec(code, names)  # noqa: S102  the README's own words
            check_snippet(code, names, capfd.readouterr().out, apart)


# ---------------------------------------------------------------------------------------------
# The job script


SMALL = ["model.name=simple_cnn", "schedule.name=constant", "log.report=false"]
SHIMS = {
    # Runs the project's script on a few images, in the reader's folder.
    "python": f"""script=$1; shift
exec {sys.executable} {ROOT}/"$script" "$@" {" ".join(SMALL)} train.epochs=$(cat epochs)""",
    # The time is up when an epoch is done, once.
    "srun": """"$@" &
if [ ! -e warned ]; then
    until [ -s logs/cnn/history.csv ] || ! kill -0 $!; do sleep 0.01; done
    touch warned; kill -USR1 $!
fi
wait $!""",
    "scontrol": 'echo "$@" >> asked',
}


def test_the_job_script_is_stopped_saved_queued_again_and_comes_to_the_same_end(scratch):
    ((_, script),) = [block for block in the("SLURM, and machines that are taken away").blocks]
    Path("job.sh").write_text(script, encoding="utf-8")
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script, re.MULTILINE))
    assert len(options) == script.count("#SBATCH") and options["signal"] == "USR1@120", (
        "without B: it goes to what srun started, as it does here"
    )
    Path("bin").mkdir()
    for name, text in SHIMS.items():
        Path("bin", name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        Path("bin", name).chmod(0o755)
    env = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT)}

    def submit() -> int:
        done = subprocess.run(["bash", "job.sh"], env=env, check=False, timeout=100)
        return done.returncode

    Path("epochs").write_text("100000")
    assert submit() == 138 and Path("asked").read_text() == "requeue 7\n"
    epochs = len(Path("logs/cnn/history.csv").read_text().splitlines()) + 1
    Path("epochs").write_text(f"{epochs}")
    assert submit() == 0 and Path("asked").read_text() == "requeue 7\n"
    for kind in ("logs", "checkpoints"):
        shutil.move(Path(kind, "cnn"), Path("resumed", kind))
    assert "resumed from checkpoints/cnn/last.pth" in Path("resumed/logs/train.log").read_text()
    words = shlex.split(re.search(r"srun python train\.py (.*)", script)[1])
    assert run_python(scratch, "train.py", *words, *SMALL, f"train.epochs={epochs}") == 0
    for kind in ("logs", "checkpoints"):
        shutil.move(Path(kind, "cnn"), Path("whole", kind))
    assert_same_run("whole", "resumed")


# ---------------------------------------------------------------------------------------------
# Messages

FOLDER = ["--config", "configs/folder.yaml", "data.root=photos", "model.name=simple_cnn"]
QUICK = ["train.epochs=1", "log.report=false"]


class Trouble:
    """What a reader may meet, and how it comes about: each gives what is then said."""

    def __init__(self, patch: pytest.MonkeyPatch, capfd):
        self.patch, self.capfd = patch, capfd

    def train(self, *words: str, status: int = 2) -> str:
        self.capfd.readouterr()
        assert run_python(self.patch, "train.py", *words) == status
        return self.capfd.readouterr().err

    def no_module(self) -> str:
        words = [sys.executable, "-S", "-E", str(ROOT / "train.py")]
        return subprocess.run(words, capture_output=True, text=True, check=False).stderr

    def another_style(self) -> str:
        return self.train("--epochs", "5")

    def no_folder(self) -> str:
        return self.train(*FOLDER, "data.root=fotos")

    def no_files(self) -> str:
        return self.train("--config", "configs/mnist.yaml", "data.root=nowhere")

    def an_empty_class(self) -> str:
        Path("photos/狗").mkdir()
        return self.train(*FOLDER)

    def two_readings(self) -> str:
        Path("photos/狗").rmdir()
        for folder in Path("photos").iterdir():
            shutil.copytree(folder, Path("sites", folder.name, "left"))
            shutil.copytree(folder, Path("sites", folder.name, "right"))
        said = self.train(*FOLDER, "data.root=sites")
        return said.replace("sites", "photos")

    def two_classes(self) -> str:
        shutil.copy("photos/船/00.jpg", "photos/汽车/wrong.jpg")
        said = self.train(*FOLDER)
        Path("photos/汽车/wrong.jpg").unlink()
        return said

    def a_cut_image(self) -> str:
        large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))
        large.save("photos/船/98.jpg")
        os.truncate("photos/船/98.jpg", 4000)
        return self.train(*FOLDER)

    def not_utf_8(self) -> str:
        Path("labels.csv").write_text("path,label\n01.jpg,Æble\n", encoding="cp1252")
        return self.train("data.name=csv", "data.root=labels.csv")

    def bad_rows(self) -> str:
        Path("labels.csv").write_text("path,label\nphotos/船/00.jpg,\n")
        return self.train("data.name=csv", "data.root=labels.csv")

    def no_cuda(self) -> str:
        self.patch.setattr(torch.cuda, "is_available", lambda: False)
        self.patch.setattr(torch.cuda, "device_count", lambda: 0)
        return self.train("device=cuda")

    def no_memory(self) -> str:
        """torch's own words, from where it says them; and the advice is one that can be taken."""

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with self.patch.context() as patch:
            patch.setattr("cnn.training.engine.train_one_epoch", full)
            said = self.train(*QUICK, status=1)
        self.train(*QUICK, "data.batch_size=32", "train.accumulate=2", status=0)
        assert "cannot change" in self.train("--resume", "data.batch_size=16")
        return said

    def two_at_once(self) -> str:
        from cnn.utils.run_folder import RunFolder

        with RunFolder(None):
            return self.train(*QUICK)

    def other_settings(self) -> str:
        return self.train("--resume", "model.name=resnet9")

    def weights_alone(self) -> str:
        assert run_python(self.patch, "export.py", "--format", "weights") == 0
        return self.train("--resume", "checkpoints/best_weights.pt")

    def other_classes(self) -> str:
        Path("photos/船/98.jpg").unlink()
        weights = torch.load("checkpoints/best_weights.pt", weights_only=True)
        torch.save(weights | {"classes": [*weights["classes"], "one without a row"]}, "named.pt")
        said = self.train(*FOLDER, "model.weights=named.pt")
        torch.save(torch.load("named.pt", weights_only=True)["model_state_dict"], "unnamed.pt")
        assert "weights from" in self.train(*FOLDER, *QUICK, "model.weights=unnamed.pt", status=0)
        return said

    def weights_of_another_model(self) -> str:
        other = ["model.args={width: 8}", "model.weights=checkpoints/last.pth"]
        assert "weights from" in self.train(
            *FOLDER, *QUICK, *other, "model.partial_weights=true", "run=part", status=0
        )
        return self.train(*FOLDER, *other)

    def not_replaced(self) -> str:
        Image.open("photo.jpg").save("photo.png")
        self.capfd.readouterr()
        assert run_python(self.patch, "predict.py", "new_photos", "--csv", "photo.png") == 2
        return self.capfd.readouterr().err

    def other_data(self) -> str:
        self.train(*FOLDER, *QUICK, status=0)
        shutil.copy("photos/船/00.jpg", "photos/船/99.jpg")
        said = self.train("--resume", "train.epochs=2")
        weights = "model.weights=checkpoints/last.pth"
        assert "new: nothing" in self.train(*FOLDER, *QUICK, weights, "run=new", status=0)
        return said

    def no_internet(self) -> str:
        def cut_off(*_, **__):
            raise OSError("no route to host")

        self.patch.setattr(torchvision.models._api, "load_state_dict_from_url", cut_off)
        words = ["--config", "configs/finetune.yaml", "data.root=photos", "model.name=resnet18"]
        return self.train(*words)

    def divergence(self) -> str:
        return self.train("optim.lr=1e9", status=1)

    def one_image(self) -> str:
        return self.train(*QUICK, "data.batch_size=1", "data.image_size=8", "model.name=resnet18")

    def a_killed_loader(self) -> str:
        """Killed for real in test_training_runs.py; here its words."""
        return inspect.getsource(workers)

    def too_few_files(self) -> str:
        """Too few for real in test_datasets_waiting.py; here its words."""
        return f"a word; {ADVICE}"

    def no_matplotlib(self) -> str:
        self.patch.setattr(figures, "is_available", lambda: False)
        return self.train("train.epochs=1", status=0)

    def no_guard(self) -> str:
        """Python's own words."""
        return inspect.getsource(multiprocessing.spawn)

    def no_checkpoint(self) -> str:
        shutil.rmtree("checkpoints")
        self.capfd.readouterr()
        assert run_python(self.patch, "evaluate.py") == 2
        return self.capfd.readouterr().err


TROUBLES = [name for name, act in vars(Trouble).items() if name[0] != "_" and name != "train"]


def test_the_messages_that_it_explains_are_those_that_come(scratch, capfd):
    explained = re.findall(r"^- `([^`]+)`", the("What the messages mean").prose, re.MULTILINE)
    assert len(explained) == len(TROUBLES)
    trouble = Trouble(scratch, capfd)
    for message, name in zip(explained, TROUBLES):
        said = re.sub(r"\s+", " ", getattr(trouble, name)())
        pieces = [re.escape(piece.strip()) for piece in message.split("…")]
        assert re.search(".*?".join(pieces), said), (
            f"{message}\nis not what is said: {said[-2000:]}"
        )


# ---------------------------------------------------------------------------------------------
# Files and settings that it names


def listed(title: str) -> list[str]:
    """The files in the first column of a part's list."""
    ((_, text),) = the(title).blocks
    found = []
    for line in bare("text", text).splitlines():
        first, *others = line.split(", ")
        found += [first, *(str(Path(first).with_name(other)) for other in others)]
    return found


def test_the_tree_has_every_file_of_the_package_and_no_other():
    tree = listed("The tree")
    for name in tree:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name
    folders = tuple(name for name in tree if name.endswith("/"))
    sources = [*ROOT.glob("*.py"), *(ROOT / "cnn").rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix() for path in sources} - {"cnn/__init__.py"}
    assert {name for name in sources if not name.startswith(folders)} <= set(tree)


def test_a_run_leaves_what_is_listed(scratch):
    words = [*FOLDER, "train.epochs=5", "checkpoint.every_epochs=5", "log.tensorboard=true"]
    assert run_python(scratch, "train.py", *words) == 0
    files = [name for name in listed("What a run leaves")]
    for name in files:
        assert Path(name).exists(), name
    left = {path.as_posix() for kind in ("logs", "checkpoints") for path in Path(kind).iterdir()}
    assert {name for name in left if "/." not in name} - {
        "logs/archive",
        "checkpoints/archive",
    } <= {*files}


def test_the_recipes_are_all_in_the_table():
    named = set(re.findall(r"^\| `(configs/\w+\.yaml)`", the("Settings").prose, re.MULTILINE))
    assert named == {path.relative_to(ROOT).as_posix() for path in RECIPES}
