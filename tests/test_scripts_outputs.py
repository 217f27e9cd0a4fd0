"""What a script writes takes the place of nothing that cannot be made again."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

import compare
import evaluate
import export
import predict
import train

# ---------------------------------------------------------------------------------------------
# A folder with a run, its photographs and whatever else may stand where something is written


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in "a", "b":
            settings = [f"run={name}", "log.report=true", "checkpoint.every_epochs=1"]
            assert train.main([*TINY, *settings]) == 0
        Path("photos").mkdir()
        photo = Image.fromarray(np.full((9, 9, 3), 99, np.uint8))
        for ending in "png", "jpg", "bmp", "webp", "tiff", "gif":
            photo.save(f"photos/cat.{ending}")
        Path("list.txt").write_text("photos/cat.png\n")
        Path("labels.csv").write_text("path,label\nphotos/cat.png,cat\n")
        Path("table.csv").write_text("image,prediction,probability,mine\ncat.png,cat,0.9,no\n")
        Path("my.json").write_text('{"checkpoint": "mine", "confusion_matrix": []}\n')
        Path("my.html").write_text("<!DOCTYPE html><title>Mine</title>\n")
        Path("binary").write_bytes(bytes(range(256)))
        for option, command in OPTIONS.items():
            assert command(written(option)) == 0, option
    return folder


BEST = ["--checkpoint", "checkpoints/a/best.pth"]
OPTIONS = {
    "predict --csv": lambda file: predict.main(["photos/cat.png", "--csv", file, *BEST]),
    "evaluate --json": lambda file: evaluate.main(["--json", file, *BEST]),
    "evaluate --figure": lambda file: evaluate.main(["--figure", file, *BEST]),
    "export": lambda file: export_to("torch", file),
    "export weights": lambda file: export_to("weights", file),
    "export onnx": lambda file: export_to("onnx", file),
    "compare": lambda file: compare.main(["a", "b", "--output", file]),
    # The figure beside the page, which has no option of its own.
    "compare's figure": lambda file: compare.main(["a", "b", "--output", page_beside(file)]),
}
# Endings that an option insists on; export refuses those of another format.
ENDINGS = {"evaluate --figure": ".png", "compare": ".html", "compare's figure": ".png"}
ENDINGS |= {"export": "", "export weights": "", "export onnx": ""}


def export_to(form: str, file: str) -> int:
    return export.main(["--format", form, "--output", file, *BEST])


def page_beside(figure: str) -> str:
    return str(Path(figure).with_suffix(".html"))


def written(option: str) -> str:
    """The file that the option has written, with the ending that it insists on."""
    endings = ENDINGS | {"predict --csv": ".csv", "evaluate --json": ".json"}
    endings |= {"export": ".pt2", "export weights": ".pt", "export onnx": ".onnx"}
    return option.replace(" ", "_").replace("'", "") + endings[option]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------
# Refused

FILES = [
    *(f"photos/cat.{ending}" for ending in ("png", "jpg", "bmp", "webp", "tiff", "gif")),
    *(f"checkpoints/a/{name}.pth" for name in ("best", "last", "epoch_001")),
    *(f"logs/a/{name}" for name in ("train.log", "history.csv", "config.yaml", "result.json")),
    *(f"logs/a/{name}" for name in ("predictions_val.csv", "model.txt", "report.html")),
    *(f"logs/a/{name}" for name in ("curves.png", "confusion_matrix.png")),
    *("configs/best_hparams/simple_cnn_synthetic.yaml", "list.txt", "labels.csv", "table.csv"),
    *("my.json", "my.html", "binary"),
]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_of_another_kind_is_kept(option, folder, tmp_path, monkeypatch, capfd):
    shutil.copytree(folder, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    others = [written(other) for other in OPTIONS if other != option]
    for number, file in enumerate([*FILES, *others]):
        # Where the option insists on an ending, the file has it: a kind is not known by its name.
        name = f"given{number}{ENDINGS.get(option, '')}" if option in ENDINGS else file
        if name != file:
            shutil.copyfile(file, name)
        before = contents(Path())
        assert OPTIONS[option](name) == 2, file
        said = capfd.readouterr().err
        kept = f"{name} is not replaced: it is", f"got {file}, used here already"
        assert said.startswith("error: --") and any(words in said for words in kept), said
        assert said.count("\n") == 1
        assert contents(Path()) == before, file


def linked(name: str) -> None:
    os.symlink("photos/cat.png", name)


def read_only(name: str) -> None:
    Path(name).write_bytes(Path("own").read_bytes())
    os.chmod(name, 0o444)


SPECIAL = {
    "a folder": (os.mkdir, "which is a folder or a device"),
    "a link to a folder": (
        lambda name: os.symlink("photos", name),
        "which is a folder or a device",
    ),
    "a pipe": (os.mkfifo, "which is a folder or a device"),
    "a device": (lambda name: os.symlink(os.devnull, name), "which is a folder or a device"),
    "a link to a photograph": (linked, "is not replaced: it is a PNG image"),
    "a photograph of two names": (
        lambda name: os.link("photos/cat.jpg", name),
        "is not replaced: it is a JPEG image",
    ),
    "a link to nowhere": (lambda name: os.symlink("no/where", name), "in a folder that exists"),
    "read-only": (read_only, "is not replaced: it is read-only"),
}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_file_is_kept(option, kind, folder, tmp_path, monkeypatch, capfd):
    shutil.copytree(folder, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    shutil.copyfile(written(option), "own")
    make, expected = SPECIAL[kind]
    make(name := f"given{ENDINGS.get(option, '')}")
    kept = os.lstat(name)
    before = contents(Path("photos"))
    assert OPTIONS[option](name) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: --") and expected in said, said
    assert contents(Path("photos")) == before
    assert (os.lstat(name).st_ino, os.lstat(name).st_mode) == (kept.st_ino, kept.st_mode)


def test_two_outputs_in_one_file_and_the_input_are_refused(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert evaluate.main(["--json", "x.png", "--figure", "./x.png", *BEST]) == 2
    assert export.main(["--format", "weights", "--output", BEST[1], *BEST]) == 2
    said = capfd.readouterr().err
    assert "--figure: expected a file of its own, got x.png, used here already" in said
    assert "--output: expected a file of its own, got checkpoints/a/best.pth" in said
    assert not Path("x.png").exists()


def test_a_comparison_is_a_page(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    before = contents(folder)
    for name in "x.txt", "x.png", "logs", "no/x.html":
        assert compare.main(["a", "b", "--output", name]) == 2
    said = capfd.readouterr().err
    assert "expected a name that ends with .html, got x.png" in said
    assert "expected a file in a folder that exists, got no/x.html" in said
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------------
# Replaced


@pytest.mark.parametrize("option", [*OPTIONS][:-1])  # the last is the figure of the one before
def test_what_the_option_wrote_itself_is_replaced_and_a_link_stays(
    option, folder, tmp_path, monkeypatch
):
    shutil.copytree(folder, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    name, file = Path(written(option)), Path("kept")
    shutil.move(name, file)
    os.utime(file, (0, 0))
    name.symlink_to(file)
    assert OPTIONS[option](str(name)) == 0
    assert name.is_symlink() and not file.is_symlink() and file.stat().st_mtime > 0


def test_an_empty_file_and_an_unfinished_table_are_replaced(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    expected = Path(written("predict --csv")).read_bytes()
    for content in b"", expected[: expected.index(b"\n") + 5]:
        Path("table").write_bytes(content)
        assert OPTIONS["predict --csv"]("table") == 0
        assert Path("table").read_bytes() == expected
