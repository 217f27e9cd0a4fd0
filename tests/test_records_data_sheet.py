"""What logs/data.txt and logs/division.csv say of the data, and what of it the log says."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WORDS = ("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8")


@pytest.fixture(autouse=True)
def photos():
    """Pictures of three classes in two splits, one of them twice in the training."""
    for split, number in (("train", 14), ("test", 3)):
        for label, name in enumerate(["猫", "dog", "bird"]):
            Path("photos", split, name).mkdir(parents=True)
            for i in range(number):
                side = 12 if i == 1 else 9
                noise = np.random.default_rng([i, label, number]).integers(
                    0, 256, (9, side, 3), "u1"
                )
                suffix = ".bmp" if i == 0 else ".png"
                Image.fromarray(noise).save(Path("photos", split, name, f"{i:02}{suffix}"))
    shutil.copy("photos/train/dog/03.png", "photos/train/dog/again.png")
    shutil.copy("photos/test/dog/02.png", "photos/train/dog/leak.png")


def text(name):
    return Path("logs", name).read_text(encoding="utf-8")


def test_the_data_sheet_says_what_a_careful_colleague_would_ask_for(train):
    assert train(*WORDS) == 0
    sheet = text("data.txt")
    lines = [" ".join(line.split()) for line in sheet.splitlines()]
    for line in (
        "source folder photos",
        "formats PNG 46, BMP 6",
        "width x height 9 x 9 to 12 x 9 pixels, median 9 x 9",
        "cut away 4% of the pixels, at most 25% of one",
        "resized to 8 x 8 pixels; channels: 3",
        "data.fit crop",
        "decoded 0 JPEG files at 1/2, 1/4 or 1/8 of their size",
        "class train val test all",
        "猫 13 1 3 17",
        "dog 13 2 3 18",
        "all 39 4 9 52",
        "1 image in several splits; data.on_duplicate left out 1 of train, 0 of val",
        "1 image with copies in the same split, each of which counts",
    ):
        assert any(line in found for found in lines), (line, sheet)
    assert "02.png (dog, test)" in sheet and "leak.png (dog, train)" in sheet
    report = Path("logs/train.log").read_text(encoding="utf-8")
    assert "formats PNG 46, BMP 6; width x height 9 x 9 to 12 x 9 pixels" in report
    start = report[: report.index(" model ")].splitlines()
    assert len(start) <= 1 + 9 and not any("leak.png" in line for line in start)


def test_every_image_is_in_the_division_with_its_copies_in_a_group(train):
    assert train(*WORDS) == 0
    rows = list(csv.DictReader(text("division.csv").splitlines()))
    assert [len([row for row in rows if row["split"] == s]) for s in ("train", "val", "test")] == [
        *(39, 4, 9)
    ]
    assert {row["label"] for row in rows} == {"猫", "dog", "bird"}
    grouped = [row for row in rows if row["group"]]
    assert {Path(row["image"]).name for row in grouped} == {"03.png", "again.png"}
    assert {row["group"] for row in grouped} == {"1"} and len(
        {row["split"] for row in grouped}
    ) == 1
    assert not any(row["image"].endswith("leak.png") for row in rows)


def test_both_are_the_same_after_a_resume(train):
    assert train(*WORDS) == 0
    before = text("data.txt"), text("division.csv")
    Path("logs/data.txt").unlink()
    assert train("--resume", "train.epochs=3") == 0
    assert (text("data.txt"), text("division.csv")) == before


def test_data_without_files_have_a_sheet_too(train):
    assert train() == 0
    assert text("data.txt").startswith("source") and "class" in text("data.txt")
    assert text("division.csv").splitlines()[0] == "image,label,split,group"


def test_the_report_has_the_data_sheet(train):
    pytest.importorskip("matplotlib")
    assert train(*WORDS, "log.report=true", "train.epochs=1") == 0
    report = text("report.html")
    for part in ("PNG 46, BMP 6", "1 image in several splits", "photos/train/dog/leak.png (dog"):
        assert part in report
