"""export.py: files that give the model's answers without this project, and say all that they need."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from archives import MARKER, changed
from conftest import ROOT, TINY
from PIL import Image

import export as script
import predict as predict_script
import train as train_script
from cnn.config import ModelConfig
from cnn.inference import export
from cnn.models.build import build_model
from cnn.utils.checkpoint import load_checkpoint

COLOUR = "data.args={num_images: 40, num_test: 20, num_classes: 4, image_size: 16, channels: 3}"
RUNS = {
    "simple_cnn": ["model.args={width: 4}"],
    "resnet9": ["model.name=resnet9", "model.args={width: 4}", COLOUR, "train.ema_decay=0.5"],
}
LARGE = {
    "resnet18": 64,
    "convnext_tiny": 64,
    "vit_b_16": 64,
    "swin_t": 64,
    "efficientnet_lite0": 33,
}
FILES = {"torch": "best.pt2", "onnx": "best.onnx", "weights": "best_weights.pt"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, trained once: best.pth in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        for name, words in RUNS.items():
            assert train_script.main([*TINY, *words, "train.epochs=1", f"run={name}"]) == 0
        return Path.cwd() / "checkpoints"


@pytest.fixture(scope="module")
def exported(runs) -> Path:
    """A folder with the first of them in each format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs / "simple_cnn")
        for form, name in FILES.items():
            assert (
                script.main(["--checkpoint", "best.pth", "--format", form, "--output", name]) == 0
            )
        return Path.cwd()


@pytest.fixture
def best(runs, folder_of_its_own) -> Path:
    """The checkpoint of the first of them, in the test's own folder."""
    Path("checkpoints").mkdir()
    return Path(shutil.copy(runs / "simple_cnn/best.pth", "checkpoints/best.pth"))


def model_of(checkpoint: Path) -> tuple[torch.nn.Module, dict]:
    """The model that takes pixels in 0..1, put together by hand; and what its file holds."""
    saved = torch.load(checkpoint, weights_only=True)
    cfg, pre = saved["config"]["model"], saved["preprocessing"]
    model, _ = build_model(
        *(ModelConfig(cfg["name"], cfg["args"]), saved["classes"]),
        *(pre["channels"], pre["image_size"], 5),
    )
    model.load_state_dict(saved["ema_state_dict"] or saved["model_state_dict"])
    mean, std = (torch.tensor(pre[name])[:, None, None] for name in ("mean", "std"))
    model.eval()
    return lambda images: model((images - mean) / std), saved


def answers_of(path: Path, images: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """What an exported file answers, and what it says of itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = dict(session.get_modelmeta().custom_metadata_map)
        for key in ("classes", "preprocessing"):
            about[key] = json.loads(about[key])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), about
    about = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=about).module()
    return module(images), json.loads(about["metadata.json"])


def export_and_check(checkpoint: Path, form: str, capfd, *more: str) -> None:
    output = Path(FILES[form]).resolve()
    words = ["--checkpoint", str(checkpoint), "--format", form, "--output", str(output)]
    assert script.main([*words, *more]) == 0
    said = capfd.readouterr().err
    (difference,) = re.findall(
        r"batches of 1 and 17: largest difference from PyTorch ([\d.e-]+)", said
    )
    assert float(difference) < 1e-4 and "validation images" in said
    check(checkpoint, output)


@torch.no_grad()
def check(checkpoint: Path, output: Path) -> None:
    model, saved = model_of(checkpoint)
    pre, largest = saved["preprocessing"], 0.0
    for number in (1, 17, 5):
        images = torch.rand(number, pre["channels"], pre["image_size"], pre["image_size"])
        got, about = answers_of(output, images)
        assert got.shape == (number, len(saved["classes"]))
        largest = max(largest, (got - model(images)).abs().max().item())
    assert largest < 1e-4
    print(f"{saved['config']['model']['name']} {output.suffix} {largest:.2g}")
    assert about["classes"] == saved["classes"] and about["preprocessing"] == pre
    assert about["input"].startswith(f"images: float32 (N, {pre['channels']}, ")


@pytest.mark.parametrize(
    "fit, resize",
    {"crop": "the shorter side", "pad": "the longer side", "stretch": "each side"}.items(),
)
def test_an_exported_file_says_how_a_picture_is_prepared(train, fit, resize):
    decode = "full" if fit == "pad" else "scaled"
    assert train("train.epochs=1", f"data.fit={fit}", f"data.decode={decode}") == 0
    assert script.main(["--format", "weights", "--output", "weights.pt"]) == 0
    about = torch.load("weights.pt", weights_only=True)
    assert about["resize"] == f"{resize} to 8 pixels, bilinear with antialiasing"
    assert about["crop"] == "the middle 8 x 8 pixels; black outside the picture"
    assert about["preprocessing"]["fit"] == fit
    expected = "in full" if decode == "full" else "at 14 pixels or more (shorter side)"  # 8 * 1.725
    assert expected in about["decoding"] and ("14" in about["decoding"]) == (decode == "scaled")


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_an_exported_file_answers_as_the_model_does_for_any_number_of_images(
    runs, exported, capfd, form
):
    export_and_check(runs / "resnet9/best.pth", form, capfd)
    check(exported / "best.pth", exported / FILES[form])


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGE)
def test_a_large_network_trains_resumes_is_exported_and_predicts(train, capfd, name):
    size = LARGE[name]
    args = "{image_size: 64}" if name == "vit_b_16" else "{}"
    words = [f"model.name={name}", f"model.args={args}", COLOUR.replace("16", str(size))]
    assert train(*words, "train.epochs=1", "data.batch_size=18") == 0
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] == 2
    assert train("--resume", "train.epochs=2") == 0
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] == 4
    for form in ("torch", "onnx"):
        export_and_check(Path("checkpoints/best.pth"), form, capfd)
    Image.new("RGB", (size, size)).save("one.png")
    assert predict_script.main(["one.png"]) == 0
    assert re.search(r"one.png.*pattern \d", capfd.readouterr().out)


BRANCHES = """
import torch

def shifted(width):
    return lambda x: x + width

class Branches(torch.nn.Linear):
    def __init__(self, num_classes, in_channels, widths):
        super().__init__(in_channels * 64, num_classes)
        self.functions = [shifted(width) for width in widths]
    def forward(self, images):
        logits = super().forward(torch.nn.functional.pad(images, (1, 1))[..., 1:-1].flatten(1))
        if torch.compiler.is_exporting():
            return torch.cond(logits.sum() > 0, *self.functions, (logits,))
        return self.functions[0 if logits.sum() > 0 else 1](logits)
"""


@pytest.fixture
def ours(train, monkeypatch) -> Path:
    """The checkpoint of a model of one's own, which has branches with graphs of their own."""
    monkeypatch.delitem(sys.modules, "branches", raising=False)  # of another test's folder
    Path("branches.py").write_text(BRANCHES)
    words = ["model.name=branches:Branches", "model.args={widths: [1.0, 2.0]}", "train.epochs=1"]
    assert train(*words) == 0
    return Path("checkpoints/best.pth")


def test_an_exported_file_names_no_file_and_no_folder(ours, exported):
    for form, name in FILES.items():
        assert script.main(["--format", form, "--output", name]) == 0
        for folder in (ours.parent.parent, exported):
            content = (folder / name).read_bytes()
            for origin in (ROOT, Path.cwd(), Path.home(), Path(sys.prefix)):
                assert bytes(origin) not in content, f"{name}: {origin}"
            for word in (b"site-packages", b".py", b"stack_trace", b"torch.nn", b"Branches("):
                assert word not in content, f"{name}: {word}"


def test_the_modules_of_a_model_can_still_be_told_apart_in_a_file_for_torch(exported):
    program, images = torch.export.load(exported / "best.pt2"), torch.rand(3, 1, 8, 8)
    modules = torch.export.unflatten(program)
    assert torch.equal(modules(images), program.module()(images))
    assert modules.get_submodule("model.features.0.0").weight.shape[0] == 4


def test_a_checkpoint_is_exported_to_the_same_bytes_anywhere(exported):
    """From another folder, by another copy of the project, as another user, without the data."""
    shutil.copytree(ROOT / "cnn", "elsewhere/cnn")
    shutil.copy(ROOT / "export.py", "elsewhere")
    shutil.copy(exported / "best.pth", "elsewhere/other name.pth")
    export_all = (
        "import sys, export\n"
        "for name in sys.argv[1:]:\n"
        "    words = ['--checkpoint', 'other name.pth', '--output', name, 'data.name=mnist']\n"
        "    assert export.main([*words, 'data.root=nowhere']) == 0\n"
    )
    other = {"PYTHONHASHSEED": "7", "USER": "a", "HOME": "/a", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-c", export_all, *FILES.values()],
        cwd="elsewhere",
        env={**os.environ, **other, "PYTHONPATH": "."},
        check=True,
    )
    for name in FILES.values():
        assert (exported / name).read_bytes() == Path("elsewhere", name).read_bytes(), name


@pytest.mark.parametrize("opset, ir_version", [(14, 7), (21, 10)])
def test_onnx_is_written_in_the_opset_that_is_asked_for(best, capfd, opset, ir_version):
    export_and_check(best, "onnx", capfd, "--opset", str(opset))
    proto = onnx.load("best.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert proto.ir_version == ir_version


def test_an_opset_that_the_model_cannot_be_converted_to_is_refused(ours, capfd):
    capfd.readouterr()
    assert script.main(["--format", "onnx", "--opset", "17"]) == 2
    said = capfd.readouterr().err
    assert "cannot export branches:Branches with opset 17: " in said
    assert "; expected a higher opset, or none" in said and "Traceback" not in said
    assert not Path("checkpoints/best.onnx").exists()


def test_an_opset_that_torch_does_not_write_is_refused(best, capfd, monkeypatch):
    """torch.onnx warns, and writes another one."""
    monkeypatch.setattr(export, "TORCH_OPSET", 1)
    assert script.main(["--format", "onnx", "--opset", "17"]) == 2
    assert "opset 17: torch.onnx has written another opset; exp" in capfd.readouterr().err
    assert not Path("checkpoints/best.onnx").exists()


def test_a_name_without_a_known_ending_goes_with_any_format(best):
    for form in FILES:
        assert script.parse(["--format", form, "--output", "model.bin"]).format == form
    assert script.parse(["--output", "model.ONNX"]).format == "onnx"


def test_a_file_that_does_not_agree_is_not_left_behind(best, capfd, monkeypatch):
    forward = export.Deployed.forward
    assert script.main([]) == 0
    earlier = Path("checkpoints/best.pt2")
    before = earlier.read_bytes()
    monkeypatch.setattr(
        export.Deployed, "forward", lambda self, images: forward(self, images) + 3e-4
    )
    assert script.main([]) == 1
    said = capfd.readouterr().err
    assert "error: the exported model disagrees on 6 validation images" in said and "0.0003" in said
    assert earlier.read_bytes() == before
    assert {path.name for path in Path("checkpoints").iterdir()} == {"best.pth", "best.pt2"}


def test_without_the_data_random_images_do_and_that_is_said(best, capfd):
    assert script.main(["--format", "weights", "data.name=mnist", "data.root=nowhere"]) == 0
    said = capfd.readouterr().err
    assert "the images of the training are not available here (" in said
    assert "checked on random images in batches of 1 and 17: " in said


def test_images_of_another_shape_are_not_what_it_is_checked_on(best, capfd):
    words = ["data.name=synthetic", f"{COLOUR}"]
    assert script.main(["--format", "weights", *words]) == 0
    said = capfd.readouterr().err
    assert "expected 1 channels, got 3" in said


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_its_packages_onnx_is_refused_with_what_to_install(
    best, capfd, monkeypatch, missing
):
    monkeypatch.setitem(sys.modules, missing, None)
    assert script.main(["--format", "onnx"]) == 2
    expected = f"--format onnx needs {missing}: pip install -r requirements-export.txt"
    assert capfd.readouterr().err == f"error: {expected}\n"


NOT_A_GRAPH = """
import torch

class Branching(torch.nn.Linear):
    def __init__(self, num_classes, in_channels):
        super().__init__(in_channels * 64, num_classes)
    def forward(self, images):
        logits = super().forward(images.flatten(1))
        return logits if logits.sum() > 0 else -logits

class Bessel(Branching):
    def forward(self, images):
        return torch.nn.Linear.forward(self, torch.special.bessel_j0(images.flatten(1)))
"""


def test_a_model_that_is_no_graph_is_refused_but_its_weights_are_not(train, capfd):
    Path("no_graph.py").write_text(NOT_A_GRAPH)
    assert train("model.name=no_graph:Branching", "model.args={}", "train.epochs=1") == 0
    capfd.readouterr()
    assert script.main([]) == 2
    said = capfd.readouterr().err
    assert "model.name: torch.export cannot export no_graph:Branching: " in said
    assert "--format weights exports any model" in said and "Traceback" not in said
    assert not Path("checkpoints/best.pt2").exists()
    assert script.main(["--format", "weights"]) == 0


def test_an_operator_that_onnx_has_not_is_named(train, capfd):
    Path("no_onnx.py").write_text(NOT_A_GRAPH)
    assert train("model.name=no_onnx:Bessel", "model.args={}", "train.epochs=1") == 0
    capfd.readouterr()
    assert script.main(["--output", "a.onnx"]) == 2
    said = capfd.readouterr().err
    assert "torch.onnx cannot export no_onnx:Bessel: No ONNX function found for" in said
    assert "bessel_j0" in said and "Traceback" not in said and not Path("a.onnx").exists()


def test_exported_weights_begin_another_run(best, train, capfd):
    assert script.main(["--output", "mine.pt"]) == 0
    words = ["model.weights=mine.pt", *RUNS["simple_cnn"], "train.epochs=1"]
    assert train(*words) == 0
    assert "tensors; new: nothing" in capfd.readouterr().err


def test_a_new_run_moves_what_was_exported_along(best, train):
    for form in ("torch", "weights"):
        assert script.main(["--format", form]) == 0
    assert train("train.epochs=1") == 0
    assert {path.name for path in Path("checkpoints").glob("best*")} == {"best.pth"}
    (kept,) = Path("checkpoints/archive").iterdir()
    assert {path.name for path in kept.iterdir()} == {"best.pth", "best.pt2", "best_weights.pt"}


STRANGE = {
    "no checkpoint": ([], "checkpoints/best.pth: no such file; train first: python train.py"),
    "a file of something": (["--checkpoint", "text.pth"], "text.pth: not a checkpoint"),
    "code of others": (["--checkpoint", "code.pth"], "model.name: names code outside this folder"),
    "a loss of others": (["--checkpoint", "loss.pth"], "type loss.name=subprocess:Popen"),
    "other weights": (["--checkpoint", "weights.pth"], "its weights do not fit its model"),
    "no preprocessing": (["--checkpoint", "odd.pth"], "odd.pth: preprocessing: expected"),
    "another setting": (["optim.lr=1"], "optim.lr: cannot be changed here, where only data.name"),
    "no folder": (["--output", "no/a.pt2"], "--output: expected a file in a folder that exists"),
    "a folder": (["--output", "folder"], "--output: expected a file, got folder"),
    "a name of torch's for onnx": (
        ["--format", "onnx", "--output", "a.pt2"],
        "--output: expected a name that ends with .onnx for --format onnx, got a.pt2",
    ),
    "a name of onnx's for weights": (
        ["--format", "weights", "--output", "a.ONNX"],
        "expected a name that ends with .pt or .pth for --format weights, got a.ONNX",
    ),
    "a name of weights' for torch": (
        ["--format", "torch", "--output", "a.pt"],
        "expected a name that ends with .pt2 for --format torch, got a.pt",
    ),
    "an opset for torch": (["--opset", "18"], "--opset: expected --format onnx, got --format tor"),
    "an opset of long ago": (
        ["--format", "onnx", "--opset", "13"],
        "--opset: expected 14 to 25, got 13",
    ),
    "an opset to come": (["--output", "a.onnx", "--opset", "26"], "--opset: expected 14 to 25"),
    "no opset": (["--output", "a.onnx", "--opset", "0"], "--opset: expected 14 to 25, got 0"),
    "itself": (
        ["--checkpoint", "good.pth", "--output", "good.pth"],
        "expected a file of its own, got good.pth",
    ),
}


@pytest.mark.parametrize("words, expected", STRANGE.values(), ids=STRANGE)
def test_what_cannot_be_exported_is_refused_with_one_message(runs, capfd, words, expected):
    def config(section: str, **values: object) -> bytes:
        return changed(lambda tree: tree["config"][section].update(values))

    touch = {"args": {"args": ["touch", str(MARKER)]}}
    Path("text.pth").write_text("hello")
    Path("code.pth").write_bytes(config("model", name="subprocess:Popen", **touch))
    Path("loss.pth").write_bytes(config("loss", name="subprocess:Popen", **touch))
    Path("weights.pth").write_bytes(config("model", args={"width": 3}))
    Path("odd.pth").write_bytes(changed(lambda tree: tree["preprocessing"].update(std=[0.0])))
    Path("folder").mkdir()
    shutil.copy(runs / "simple_cnn/best.pth", "good.pth")
    before = set(os.listdir())
    if words and words[0] != "--checkpoint":
        words = ["--checkpoint", "good.pth", *words]
    assert script.main(words) == 2
    said = capfd.readouterr().err
    assert expected in said and "Traceback" not in said and said.count("error: ") == 1, said
    assert set(os.listdir()) == before and not MARKER.exists()
