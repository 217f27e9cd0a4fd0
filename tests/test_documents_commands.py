"""The documents keep their word: each command and each snippet runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run
from documents import (  # noqa: F401  scratch and workshop are fixtures
    CHINESE_ONLY,
    CLASSES,
    FOLDER,
    PAIRS,
    QUICK,
    Part,
    bare,
    parts,
    run_command,
    run_python,
    scratch,
    workshop,
)
from PIL import Image

from cnn.inference.predictor import load

STORIES = ("medical.md",)  # pages whose sections stand on one another; others each begin anew
INFERENCE, RESUME = parts(ROOT / "docs/inference.md"), parts(ROOT / "docs/resume.md")


def the(title: str, page: list[Part]) -> Part:
    (found,) = [part for part in page if part.title == title]
    return found


def tasks() -> dict[str, list[tuple[str, str]]]:
    """The blocks that are tried together, by a name. What stands twice is tried where it is first."""
    found, seen = {}, set()
    for english, chinese in PAIRS.items():
        only_there = [part for part in parts(chinese) if part.title.endswith(CHINESE_ONLY)]
        for part in [*parts(english), *only_there]:
            blocks = []
            for language, code in part.blocks:
                lines = bare(language, code).splitlines()
                if language == "sh":
                    lines = [line for line in lines if line not in seen]
                    seen.update(lines)
                blocks.append((language, code if language != "sh" else "\n".join(lines)))
            name = english.stem if english.name in STORIES else f"{english.stem}: {part.title}"
            found.setdefault(name, []).extend(blocks)
    return {name: blocks for name, blocks in found.items() if any(code for _, code in blocks)}


TASKS = tasks()


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


@pytest.mark.parametrize("name", TASKS)
def test_what_it_says_to_type_does_it(name, scratch, capfd):  # noqa: F811
    for language, code in TASKS[name]:
        named = re.match(r"# (\S+\.(?:py|yaml))\n", code)
        if named and language in ("python", "yaml"):  # a file that the reader writes
            Path(named[1]).write_text(code, encoding="utf-8")
        elif language == "sh":
            for line in code.splitlines():
                run_command(scratch, line)
                capfd.readouterr()
        elif language == "python":
            names: dict = {}
            exec(code, names)  # noqa: S102  the document's own words
            check_snippet(code, names, capfd.readouterr().out)
        else:
            assert language == "text" or (language, name) == ("bash", "resume: SLURM")


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_other_programs_prepare_a_picture_as_the_model_was_trained(fit, scratch, capfd):  # noqa: F811
    """A long one, also as JPEG, which predict.py decodes at half its size and the snippets in full.

    The probabilities then differ by up to 2e-4 here. Those of another fit differ by 1e-2.
    """
    words = [*FOLDER, *QUICK, f"data.fit={fit}", "data.image_size=32"]
    assert run_python(scratch, "train.py", *words) == 0
    snippets = [code for language, code in the("Export", INFERENCE).blocks if language == "python"]
    coarse = np.random.default_rng(0).integers(0, 255, (18, 64, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((640, 180))  # with pad 9 pixels high: 23 are black
    for ending, code in zip(("pt2", "onnx"), reversed(snippets[:2])):
        assert run_python(scratch, "export.py", "--output", f"checkpoints/best.{ending}") == 0
        for form, apart in (("PNG", 0), ("JPEG", 5e-4)):
            photo.save("photo.jpg", form)
            names: dict = {}
            exec(code, names)  # noqa: S102  the document's own words
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


def test_the_job_script_is_stopped_saved_queued_again_and_comes_to_the_same_end(scratch):  # noqa: F811
    ((_, script),) = [block for block in the("SLURM", RESUME).blocks]
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
