"""docs/troubleshooting.md explains the messages that come, word for word."""

import inspect
import multiprocessing.spawn
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from documents import FOLDER, QUICK, parts, run_python, scratch, workshop  # noqa: F401
from PIL import Image

from cnn.datasets import workers
from cnn.errors import ADVICE
from cnn.records import figures


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


def explained(page: Path) -> list[str]:
    """The messages in the first column of a page's tables."""
    rows = "".join(part.prose for part in parts(page))
    return re.findall(r"^\| `([^`]+)` \|", rows, re.MULTILINE)


def test_the_messages_that_it_explains_are_those_that_come(scratch, capfd):  # noqa: F811
    messages = explained(ROOT / "docs/troubleshooting.md")
    assert len(messages) == len(TROUBLES)
    forms = {
        message: ".*?".join(re.escape(piece.strip()) for piece in message.split("…"))
        for message in messages
    }
    trouble, met = Trouble(scratch, capfd), set()
    for name in TROUBLES:
        said = re.sub(r"\s+", " ", getattr(trouble, name)())
        here = {message for message, form in forms.items() if re.search(form, said)}
        assert here, f"{name}: nothing explains: {said[-2000:]}"
        met |= here
    assert met == set(messages)
