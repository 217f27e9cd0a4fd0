"""report.html: complete in itself, true to the run, and never a reason to stop one."""

import html.parser
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from processes import run

CLASSES = {"猫": 12, "<b>&'x": 12, "$a$b": 12}
VOID = ("meta", "link", "img", "br", "path", "use", "image", "rect", "line", "hr", "input")


class Page(html.parser.HTMLParser):
    """The tags, texts and addresses of a page; complains of tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.addresses, self.open = set(), [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def report(folder: Path) -> str:
    return (folder / "logs/report.html").read_text(encoding="utf-8")


def sections(folder: Path) -> dict[str, str]:
    text = report(folder)
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A run on files and classes whose names are no good HTML."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f'<i>{number}&".png')
    return [
        *(*TINY, "data.name=folder", f"data.root={root}", "data.args={}", "data.image_size=16"),
        *("log.report=true", "train.epochs=3", "checkpoint.every_steps=1", "data.val_fraction=0.3"),
    ]


@pytest.fixture(scope="module")
def unbroken(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    status, output = run(folder, *words)
    assert status == 0 and "could not" not in output, output
    return folder


def test_the_page_is_complete_in_itself_and_says_all(unbroken):
    page = Page(report(unbroken))
    assert "script" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert sections(unbroken).keys() == {
        *("result", "curves", "val", "test", "mistakes", "training", "counts"),
        *("epochs", "environment", "config"),
    }
    text = " ".join(page.texts)
    for expected in ("test accuracy", "95 %", "always predicting", "python train.py --config logs"):
        assert expected in text


def test_names_are_text_whatever_they_are(unbroken):
    page = Page(report(unbroken))
    assert not {"b", "i"} & page.tags
    for name in CLASSES:
        texts = Page(sections(unbroken)["val"]).texts
        assert texts.count(name) >= 3, name  # table and both axes
    assert any(text.endswith('&".png') for text in page.texts)


def test_a_run_killed_twice_has_the_report_of_the_unbroken_one(words, unbroken, tmp_path):
    assert run(tmp_path, *words, trap=("training", 4, signal.SIGKILL))[0] == -signal.SIGKILL
    status, _ = run(tmp_path, "--resume", trap=("validation", 1, signal.SIGKILL))
    assert status == -signal.SIGKILL
    status, output = run(tmp_path, "--resume")
    assert status == 0, output
    whole, resumed = sections(unbroken), sections(tmp_path)
    for name in ("val", "test", "mistakes", "training", "counts", "config"):
        assert resumed[name] == whole[name], name
    line = re.compile(r'<g id="(Loss-train|Loss-val|Accuracy-val)">\s*<path d="([^"]*)"')
    assert len(line.findall(whole["curves"])) == 3
    assert line.findall(resumed["curves"]) == line.findall(whole["curves"])
    assert "resumed" in resumed["curves"] and "resumed" not in whole["curves"]
    for name in ("confusion_matrix.png", "predictions_val.csv", "result.json"):
        one, other = (folder / "logs" / name for folder in (tmp_path, unbroken))
        assert one.read_bytes() == other.read_bytes()
    assert (unbroken / "logs/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_fails_stops_nothing(train, capfd):
    Path("logs/report.html").mkdir(parents=True)
    Path("logs/report.html/a file of yours").touch()
    Path("logs/train.log").touch()
    assert train("log.report=true", "run=null") == 0
    Path("logs/report.html").unlink(missing_ok=True)
    Path("logs/report.html").mkdir()
    assert train("--resume", "train.epochs=3") == 0
    said = capfd.readouterr().err
    assert said.count("report.html: cannot be written") == 1
    assert "Traceback" not in said


def test_a_stopped_run_leaves_a_report_of_what_it_has(words, tmp_path):
    status, _ = run(tmp_path, *words, trap=("training", 4, signal.SIGTERM))
    assert status == 128 + signal.SIGTERM
    found = sections(tmp_path)
    assert "not yet tested" in found["result"] and "test" not in found


def test_a_hundred_classes_are_less_than_2_mb(train):
    data = "data.args={num_images: 600, num_test: 300, num_classes: 100, image_size: 32}"
    assert train(data, "log.report=true", "train.epochs=1") == 0
    page = Path("logs/report.html")
    assert page.stat().st_size < 2e6
    assert "most mixed up" in page.read_text(encoding="utf-8")
