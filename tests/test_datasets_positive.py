"""Of two classes, the positive one: data.positive."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import predict

WORDS = ("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8")


@pytest.fixture(autouse=True)
def photos():
    """Fewer pictures of the class that is first by name, and darker ones."""
    for name, number, shade in (("covid", 20, 60), ("normal", 40, 160)):
        for i in range(number):
            Path("photos", name).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([number, i]).integers(0, 90, (9, 9, 3)) + shade
            Image.fromarray(noise.astype("u1")).save(f"photos/{name}/{i:02}.png")


def result():
    return json.loads(Path("logs/result.json").read_text())["test"]


def text(name):
    lines = Path("logs", name).read_text(encoding="utf-8").splitlines()
    return "\n".join(" ".join(line.split()) for line in lines)


def test_it_is_the_second_by_name_and_the_log_says_so(train):
    assert train(*WORDS) == 0
    assert "positive: normal (the second by name; else data.positive=covid)" in text("train.log")
    assert "positive normal" in text("data.txt")


def test_it_is_what_sensitivity_and_auc_are_about(train, capsys):
    assert train(*WORDS, "optim.lr=0.001", "train.epochs=1") == 0
    before = result()
    assert train(*WORDS, "optim.lr=0.001", "train.epochs=1", "data.positive=covid") == 0
    assert "positive: covid\n" in text("train.log") and "positive covid" in text("data.txt")
    rows = text("predictions_test.csv").splitlines()
    assert rows[0] == "image,label,prediction,probability,p_normal,p_covid"
    hits = [row.split(",")[2] == "covid" for row in rows[1:] if "/covid/" in row]
    assert result()["test_sensitivity"] == np.mean(hits)
    assert {result()["test_sensitivity"], before["test_sensitivity"]} <= {0, 0.5, 0.25, 0.75, 1}
    assert evaluate.main([]) == 0
    out = capsys.readouterr()
    assert "positive: covid" in out.out and "the same figures, to the last digit" in out.out
    assert predict.main(["photos/covid/00.png"]) == 0
    assert "positive: covid" in capsys.readouterr().err
    assert train("--resume", "train.epochs=2") == 0


def test_other_data_have_the_positive_class_of_the_model(train, capsys):
    assert train(*WORDS, "data.positive=covid") == 0
    evaluate.main([])
    table = capsys.readouterr().out
    Path("photos").rename("other")
    assert evaluate.main(["data.root=other", "--json", "other.json"]) == 0
    assert "positive: covid" in table
    rows = json.loads(Path("other.json").read_text())["classes"]
    assert [row["class"] for row in rows] == ["normal", "covid"]


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_a_class_that_is_not_there_is_refused(train, name, capsys):
    words = WORDS if name == "folder" else ("data.name=digits", "data.args={}")
    assert train(*words, "data.positive=Covid") == 2
    assert "data.positive: expected one of " in capsys.readouterr().err


def test_a_dataset_with_fixed_labels_can_be_turned_round(train):
    Path("light_and_dark.py").write_text(
        "import numpy as np\n"
        "def data(root):\n"
        "    images = [(np.full((8, 8, 3), 200 * (i % 2), np.uint8), i % 2) for i in range(60)]\n"
        "    return {'train': images, 'classes': ['dark', 'light']}\n"
    )
    words = (
        "data.name=light_and_dark:data",
        "data.args={}",
        "data.positive=dark",
        "train.epochs=1",
    )
    assert train(*words) == 0
    assert "p_light,p_dark" in text("predictions_test.csv")
    assert evaluate.main([]) == 0
