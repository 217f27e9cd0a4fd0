"""What the documents are made of, and how each kind of command in them is tried."""

import importlib.metadata
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import venv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
import torchvision
from conftest import ROOT
from PIL import Image
from processes import run_ranks
from test_datasets_sources import write_mnist

from cnn.drill import drill

CHINESE_ONLY = "（仅中文）"  # ends the heading of a section that has no English counterpart
CLASSES = {"猫": 180, "汽车": 110, "船": 40}  # and how bright they are
FEW = ("model.name=simple_cnn", "log.report=false")
FOLDER = ("--config", "configs/folder.yaml", "data.root=photos", "model.name=simple_cnn")
QUICK = ("train.epochs=1", "log.report=false")

# ---------------------------------------------------------------------------------------------
# The pages


def counterpart(english: Path) -> Path:
    """Returns the Chinese page of an English one."""
    if english.parent == ROOT:
        return english.with_name("README.zh-CN.md")
    return english.parent / "zh" / english.name


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
PAIRS = {page: counterpart(page) for page in PAGES if counterpart(page).exists()}


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
        found = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", self.prose)
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
                for modality in "AP":
                    draw(f"images/{modality}/{name}/{number:02}.png", brightness, rng)
        for name in ("photo.jpg", "new_photos/a.jpg", "new_photos/b.jpg"):
            draw(name, CLASSES["船"], rng)
        Image.open("photo.jpg").resize((55, 40)).save("photo.jpg")  # to be resized and cut
        for number in range(24):  # two pictures of each patient, half of them ill
            kind, brightness = (("covid", 180), ("normal", 60))[number % 2]
            for picture in (1, 2):
                draw(f"xray/{kind}/patient{number:03}_{picture:02}.png", brightness, rng)
                draw(f"new_xrays/patient{number:03}_{picture:02}.png", brightness, rng)
        rows = [f"{path},{path.parent.name}" for path in Path("photos").glob("*/*.jpg")]
        Path("labels.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
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
    if "data.root=photos" in words and any("data.group" in word for word in words):
        for number, path in enumerate(sorted(Path("photos").glob("*/*.jpg"))):
            path.rename(path.with_name(f"patient{number // 2}_{path.name}"))
    if "--sensitivity" in words and "--checkpoint" not in words:  # of two classes
        shutil.rmtree("photos/船")
        two = ["--config", "configs/folder.yaml", "data.root=photos", "train.epochs=1", *FEW]
        assert run_python(patch, "train.py", *two) == 0
    if "configs/finetune.yaml" in words or "configs/xray.yaml" in words:
        fewer += ["data.image_size=32", "data.num_workers=0"]
        torch.save(torchvision.models.resnet18().state_dict(), "resnet18-f37072fd.pth")
    if "config=xray.yaml" in words:
        fewer = [*fewer, "data.image_size=32", "model.pretrained=false"]
    if "--drill" in words:  # more kills, and other hashes, are in test_drill.py
        patch.setattr(drill, "STOPS", drill.STOPS[1:2])
        patch.setattr(drill, "FRESH", drill.CONTEXT)
    assert run_python(patch, script, *words, *fewer) == 0


def a_killed_run(patch: pytest.MonkeyPatch) -> None:
    Path("train.py").symlink_to(ROOT / "train.py")
    command = [sys.executable, str(ROOT / "bench/kill_it.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("the same weights, bit for bit\n"), done.stderr[-2000:]
    assert "==== resumed from" in Path("logs/killed/train.log").read_text(encoding="utf-8")


def a_list_for_a_script(patch: pytest.MonkeyPatch, lister: str, script: str, rest: str) -> None:
    listed = subprocess.run(lister, shell=True, capture_output=True, check=True).stdout
    assert listed.count(b"\n") > 20
    with open("list.txt", "wb") as file:
        file.write(listed)
    with open("list.txt", encoding="utf-8") as file:
        patch.setattr(sys, "stdin", file)
        a_script(patch, script, rest)


def pip(patch: pytest.MonkeyPatch, rest: str, then: str) -> None:
    """pip's own reading of the words; .ci/run installs where nothing is, and goes on as told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pip._internal.commands import create_command
    name, *words = shlex.split(rest)
    options, _ = create_command(name).parse_args(words)
    for file in getattr(options, "requirements", []):
        for package in re.findall(r"^([\w-]+)>=", (ROOT / file).read_text(), flags=re.MULTILINE):
            assert importlib.metadata.version(package)
        assert file in "requirements-dev.txt" + (ROOT / "requirements-dev.txt").read_text()
    by_ci = (ROOT / ".ci/run").read_text().splitlines()
    assert any("pip install" in line and "-r requirements-dev.txt" in line for line in by_ci)
    assert not then or any(f"{line} ".startswith(f"{then} ") for line in by_ci)


def a_clone(patch: pytest.MonkeyPatch, folder: str) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
    assert Path(folder, "train.py").is_file()


def an_environment(patch: pytest.MonkeyPatch, folder: str) -> None:
    venv.create(folder)
    assert Path(folder, "bin/activate").is_file()


def conda(patch: pytest.MonkeyPatch, version: str) -> None:
    assert "10" <= version <= "14" and len(version) == 2


def nothing(patch: pytest.MonkeyPatch, *_: str) -> None:
    """Changes the reader's shell alone."""


def several_machines(patch: pytest.MonkeyPatch, rest: str) -> None:
    """torchrun's own reading of the words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = torch.distributed.run.get_args_parser().parse_args(shlex.split(rest))
    assert known.training_script == "train.py" and known.nnodes == "2"


def tensorboard(patch: pytest.MonkeyPatch, rest: str) -> None:
    """Its own reading of the command line, and that there is something to show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it brings along
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = torch.distributed.run.get_args_parser().parse_args(
            [*shlex.split(options), "train.py"]
        )
    words = shlex.split(rest)
    words += [f"train.epochs={2 if '--resume' in words else 1}", "log.report=false"]
    run_ranks(int(known.nproc_per_node), Path.cwd(), *words)
    log = Path("logs/train.log").read_text()
    assert "rank" not in log and f", {known.nproc_per_node} processes, " in log


WAYS: list[tuple[str, Callable]] = [
    (r"python (\w+\.py)(?: (.*))?", a_script),
    (r"(find [^|]*) \| python (\w+\.py) (.*)", a_list_for_a_script),
    (r"python bench/kill_it\.py", a_killed_run),
    (r"pip ((?:(?! && ).)*)(?: && (.*))?", pip),
    (r"git clone URL (\w+) && cd \1", a_clone),
    (r"python -m venv ([.\w]+)", an_environment),
    (r"source \S+/bin/activate", nothing),
    (r"conda create -n \w+ .*python=3\.(\d+)", conda),
    (r"conda activate \w+|export [A-Z_]+=\S+", nothing),
    (r"torchrun (--nnodes .*)", several_machines),
    (r"torchrun (--nproc-per-node .*) train\.py(?: (.*))?", several),
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
