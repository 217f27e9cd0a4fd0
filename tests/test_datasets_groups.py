"""Groups of images that stay together, such as a patient's, and folds (data.group, data.folds)."""

import csv
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

import compare
import evaluate
from cnn.config import DataConfig
from cnn.datasets.build import as_trained, build_data
from cnn.datasets.division import divide
from cnn.datasets.findings import Findings
from cnn.datasets.grouping import assign, hold_out, join
from cnn.datasets.images import ArrayImages
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.metrics.intervals import share
from cnn.metrics.scores import wilson

NUM_SEEDS = 20
WORDS = ("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8")
BY_PATIENT = ("data.group='p\\d+'", "data.val_fraction=0.25", "data.test_fraction=0.25")

# ---------------------------------------------------------------------------------------------
# Distribution


def shapes(seed):
    """Yields groups and labels: even, uneven, of several classes, of rare classes, single images."""
    rng = np.random.default_rng(seed)
    even = np.repeat(np.arange(60), 5)
    yield even, (even % 3)
    uneven = np.repeat(np.arange(40), rng.integers(1, 30, 40))
    yield uneven, rng.integers(0, 2, 40)[uneven]
    yield uneven, rng.integers(0, 4, len(uneven))
    rare = np.repeat(np.arange(100), rng.integers(1, 5, 100))
    yield rare, (rng.random(100) < 0.1).astype(int)[rare]
    yield np.arange(200), rng.choice(5, 200, p=[0.5, 0.2, 0.15, 0.1, 0.05])


def unevenness(parts, labels, number):
    """The standard deviation over the parts of the share of a class, as a mean over the classes."""
    table = np.zeros((number, labels.max() + 1))
    np.add.at(table, (parts, labels), 1)
    return (table / table.sum(0)).std(0).mean()


def oracle(groups, labels, number, seed):
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    parts = np.empty(len(labels), int)
    for fold, (_, test) in enumerate(folds.split(labels, labels, groups)):
        parts[test] = fold
    return parts


def is_divided(groups, parts):
    return len(np.unique([groups, parts], axis=1).T) > len(np.unique(groups))


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_folds_are_as_even_as_those_of_scikit_learn(number):
    ours, theirs = defaultdict(list), defaultdict(list)
    for seed in range(NUM_SEEDS):
        for shape, (groups, labels) in enumerate(shapes(seed)):
            order = np.random.default_rng(seed).permutation(len(labels))
            parts = assign(groups, labels, np.full(number, 1 / number), order)
            assert not is_divided(groups, parts)
            ours[shape].append(unevenness(parts, labels, number))
            theirs[shape].append(unevenness(oracle(groups, labels, number, seed), labels, number))
    for shape in ours:
        assert np.mean(ours[shape]) <= np.mean(theirs[shape]) * 1.25 + 1e-9, shape


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_what_is_held_out_is_a_fraction_of_each_class(fraction):
    for seed in range(NUM_SEEDS):
        for shape, (groups, labels) in enumerate(shapes(seed)):
            order = np.random.default_rng(seed).permutation(len(labels))
            held = hold_out(groups, labels, fraction, order)
            assert not is_divided(groups, held)
            assert set(labels[held]) == set(labels[~held]) == set(labels)
            largest = np.bincount(groups, minlength=1).max()
            for label in np.unique(labels):
                of_class = labels == label
                off = abs(held[of_class].sum() - fraction * of_class.sum())
                assert off <= max(largest, 1), (seed, shape, label)


def test_another_order_gives_other_folds_and_the_same_order_the_same():
    groups = np.repeat(np.arange(60), 5)
    orders = [np.random.default_rng(seed).permutation(300) for seed in (0, 0, 1)]
    parts = [assign(groups, groups % 3, [0.5, 0.5], order) for order in orders]
    assert (parts[0] == parts[1]).all() and (parts[0] != parts[2]).any()


def test_a_class_in_one_group_stays_in_the_training():
    groups, labels = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([0, 1, 1, 1, 1, 1, 2])
    for seed in range(NUM_SEEDS):
        held = hold_out(groups, labels, 0.5, np.random.default_rng(seed).permutation(7))
        assert held.any() and not held[[0, 1, 6]].any()


def test_copies_join_groups():
    names = np.array(["a", "a", "b", "b", "c", "d"])
    joined = join(names, np.array([1, 2, 2, 3, 4, 5]))
    assert len(set(joined[:4])) == 1 and len(set(joined)) == 3
    chain = join(np.arange(1000) // 2, (np.arange(1000) + 1) // 2)
    assert len(set(chain)) == 1


# ---------------------------------------------------------------------------------------------
# Folders and tables


def paint(path, *seed):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), "u1")
    Image.fromarray(noise).save(path)


@pytest.fixture
def photos():
    """Four pictures of each of 24 patients, of whom half are ill."""
    for patient in range(24):
        for number in range(4):
            name = ("ill", "well")[patient % 2]
            paint(f"photos/{name}/p{patient:02}_{number}.png", patient, number)


def division():
    text = Path("logs/division.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_no_patient_is_in_two_splits(train, photos):
    assert train(*WORDS, *BY_PATIENT) == 0
    splits = defaultdict(set)
    for row in division():
        assert row["group"] == Path(row["image"]).name[:3]
        splits[row["group"]].add(row["split"])
    assert len(splits) == 24 and all(len(found) == 1 for found in splits.values())
    log = Path("logs/train.log").read_text()
    assert "groups: 6" in log and re.search(r"group (p\d\d): \S+/\1_\d.png, ", log)
    assert "groups" in Path("logs/data.txt").read_text() and "is this meant" not in log


def test_a_run_with_groups_resumes_and_is_evaluated_as_trained(train, photos, capsys):
    assert train(*WORDS, *BY_PATIENT) == 0
    before = division()
    assert train("--resume", "train.epochs=3") == 0
    assert division() == before
    assert evaluate.main(["--json", "figures.json"]) == 0
    out = capsys.readouterr().out
    assert "the same figures, to the last digit" in out and "groups: 6; below 30, the" in out
    figures = json.loads(Path("figures.json").read_text())
    assert figures["groups"] == 6 and figures["positive"] == "well"


def test_compare_counts_groups_in_validation_too(train, photos, capsys):
    assert train(*WORDS, *BY_PATIENT) == 0
    capsys.readouterr()
    assert compare.main(["."]) == 0
    text = Path("logs/predictions_val.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    hits = np.array([row["label"] == row["prediction"] for row in rows])
    groups = np.unique([Path(row["image"]).name[:3] for row in rows], return_inverse=True)[1]
    low, high = share(hits, np.ones(len(hits), bool), groups)
    assert (low, high) != wilson(int(hits.sum()), len(hits))
    expected = f"{hits.mean():.4f} (95 %: {low:.4f} to {high:.4f})"
    assert expected in capsys.readouterr().out


def test_groups_of_one_image_each_are_told(train, photos):
    assert train(*WORDS, "data.group='p.*'") == 0
    assert "no group has two images: is this meant?" in Path("logs/train.log").read_text()


def test_pictures_of_another_hospital_have_groups_of_their_own(train, photos, capsys):
    assert train(*WORDS, *BY_PATIENT) == 0
    for path in sorted(Path("photos").glob("*/p1*.png")):
        other = Path("others", path.parent.name, path.name.replace("p1", "H1"))
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
    capsys.readouterr()
    assert evaluate.main(["data.root=others"]) == 2
    assert "type data.group=REGEX for these files, or null" in capsys.readouterr().err
    assert evaluate.main(["data.root=others", "data.group=H\\d+"]) == 0
    said = capsys.readouterr()
    number = len(list(Path("others").glob("*/*")))
    trained = sum(row["split"] == "train" and "/p1" in row["image"] for row in division())
    assert f"{trained} of {number} images were trained on: not a test" in said.err
    assert "groups: 10; below 30" in said.out
    assert train(*WORDS, "run=without") == 0
    capsys.readouterr()
    words = ["--checkpoint", "checkpoints/without/best.pth", "data.root=others"]
    assert evaluate.main([*words, "data.group=H\\d+"]) == 0
    assert "groups: 10; below 30" in capsys.readouterr().out, "also where the training had none"
    Path("photos").rename("away")
    assert evaluate.main(["data.root=others", "data.group=null"]) == 0
    said = capsys.readouterr()
    assert "are these images new to the model?" in said.err and "groups" not in said.out


@pytest.mark.parametrize(
    ("pattern", "name"), [("p\\d+", "p00"), ("^[a-z]+/p(\\d)(\\d)", "0/0"), ("[^/]+$", "p00_0.png")]
)
def test_the_name_of_a_group_is_what_the_expression_finds(photos, pattern, name):
    cfg = DataConfig("folder", "photos", group=pattern, image_size=8)
    data = build_data(cfg, seed=0)
    assert name in {*data.train.group_names, *data.val.group_names, *data.test.group_names}


def write_table(*columns, splits=None):
    rows = []
    for path in sorted(Path("photos").glob("*/*.png")):
        patient = path.name[:3]
        split = (splits or {}).get(patient, "train")
        row = {"path": path, "label": path.parent.name, "split": split, "group": patient}
        rows.append(",".join(str(row.get(column, patient)) for column in columns))
    Path("table.csv").write_text("\n".join([",".join(columns), *rows]))


def test_a_table_has_groups_in_a_column(photos):
    write_table("path", "label", "group")
    data = build_data(DataConfig("csv", "table.csv", image_size=8), seed=0)
    found = [set(images.group_names) for images in data.splits.values()]
    assert all(found) and len(set.union(*found)) == sum(map(len, found)) == 24


@pytest.mark.parametrize("column", ["patient", "Patient ID", "subject_id", "患者编号"])
def test_a_column_that_looks_like_groups_is_told(photos, column):
    write_table("path", "label", column)
    data = build_data(DataConfig("csv", "table.csv", image_size=8), seed=0)
    assert data.train.group_names is None
    assert any(f"with one {column} belong together" in line for line in data.findings.found)


def test_other_columns_are_not_taken_for_groups(photos):
    write_table("path", "label", "age", "showcase")
    data = build_data(DataConfig("csv", "table.csv", image_size=8), seed=0)
    assert not any("belong together" in line for line in data.findings.found)


def test_given_splits_that_divide_a_group_are_refused(photos):
    paint("photos/ill/p00_9.png", 99)
    write_table("path", "label", "split", "group", splits={"p01": "test", "p03": "val"})
    text = Path("table.csv").read_text()
    Path("table.csv").write_text(text.replace("p00_9.png,ill,train", "p00_9.png,ill,test"))
    with pytest.raises(Refused, match="1 of 24 groups are in several splits: p00 in train and"):
        build_data(DataConfig("csv", "table.csv", image_size=8), seed=0)


def test_an_image_without_a_group_is_refused(photos):
    write_table("path", "label", "group")
    Path("table.csv").write_text(Path("table.csv").read_text().replace("ill,p00", "ill,", 1))
    with pytest.raises(Refused, match=r"1 with no group: line 2"):
        build_data(DataConfig("csv", "table.csv", image_size=8), seed=0)
    with pytest.raises(Refused, match=r"nothing that matches .p1.*d. in 56 of 96 paths: ill"):
        build_data(DataConfig("folder", "photos", group="p1\\d", image_size=8), seed=0)


def test_a_part_of_a_path_that_is_empty_is_no_group(photos):
    with pytest.raises(Refused, match="nothing that matches .* in 56 of 96 paths: ill/p00"):
        build_data(DataConfig("folder", "photos", group=r"(p1\d|$)", image_size=8), seed=0)


def test_a_table_may_name_files_anywhere(photos):
    write_table("path", "label")
    Path("tables").mkdir()
    text = Path("table.csv").read_text().replace("photos/", f"{Path('photos').resolve()}/")
    Path("tables/table.csv").write_text(text)
    cfg = DataConfig("csv", "tables/table.csv", group=r"p\d\d_", image_size=8)
    assert "p00_" in {*build_data(cfg, seed=0).train.group_names}


def test_checkpoints_from_before_groups_are_read_without(photos):
    write_table("path", "label", "group")
    cfg, pre = DataConfig("csv", "table.csv", image_size=8), Preprocessing(8, 3, [0.5] * 3, [1] * 3)
    data = build_data(cfg, seed=0)
    assert as_trained(cfg, data.fingerprint(), pre).group is None
    before = {key: value for key, value in data.fingerprint().items() if key != "groups"}
    old = build_data(as_trained(cfg, before, pre), seed=0)
    assert data.train.group_names is not None and old.train.group_names is None
    assert as_trained(replace(cfg, group="p."), before, pre).group == "p.", "typed for other data"


def test_too_few_groups_are_refused(photos):
    for pattern, fault in ((".*/", "too few groups"), ("^(?=.)(?:ill|well)", "too few groups")):
        with pytest.raises(Refused, match=fault):
            build_data(DataConfig("folder", "photos", group=pattern, image_size=8), seed=0)


def test_copies_under_two_patients_stay_together(photos):
    for patient in (2, 4, 6, 8):
        paint(f"photos/ill/p{patient:02}_copy.png", 0, 0)
    data = build_data(DataConfig("folder", "photos", group=r"p\d+", image_size=8), seed=0)
    together = {"p00", "p02", "p04", "p06", "p08"}
    found = [together & set(images.group_names) for images in data.splits.values()]
    assert sorted(map(len, found)) == [0, 0, 5]


# ---------------------------------------------------------------------------------------------
# Folds


@pytest.mark.parametrize("group", [None, r"p\d+"])
def test_every_image_is_in_the_test_of_one_fold(photos, group):
    tested, validated = [], []
    for fold in range(5):
        cfg = DataConfig("folder", "photos", group=group, folds=5, fold=fold, image_size=8)
        data = build_data(cfg, seed=0)
        names = [{images.name(i) for i in range(len(images))} for images in data.splits.values()]
        assert sum(map(len, names)) == len(set.union(*names)) == 96
        tested += names[2]
        validated.append(names[1])
        if group:
            groups = [set(images.group_names) for images in data.splits.values()]
            assert sum(map(len, groups)) == 24
    assert len(tested) == len(set(tested)) == 96 and all(validated)


def test_test_images_of_the_dataset_are_in_no_fold():
    images = ArrayImages(np.arange(60, dtype="u1").reshape(-1, 1, 1, 1), np.arange(60) % 2, "x")
    splits = {"train": images.subset(np.arange(50)), "test": images.subset(np.arange(50, 60))}
    findings = Findings()
    parts = divide(splits, DataConfig(folds=5, fold=1), 0, findings)
    assert {len(parts["test"])} == {10} and parts["test"].rows.max() < 50
    assert list(findings.found) == [
        "data.folds: the 10 images of test are in no fold, and are not used"
    ]


def test_fewer_groups_than_folds_are_refused(photos):
    cfg = DataConfig("folder", "photos", group="^.*?/", folds=5, fold=4, image_size=8)
    with pytest.raises(Refused, match=r"too few images or groups \(2\) for 5 folds"):
        build_data(cfg, seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.folds=5"], "data.folds: needs data.fold"),
        (["data.fold=0"], "data.fold: needs data.folds"),
        (["data.folds=5", "data.fold=5"], "data.fold: expected at most 4"),
        (["data.folds=1", "data.fold=0"], "data.folds: expected a whole number of at least 2"),
        (["data.name=folder", "data.group=(p"], "data.group: expected a regular expression"),
        (["data.group=p"], "data.group: expected data.name=folder or csv"),
        (["data.positive=0"], "data.positive: expected one of two classes; there are 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(train, words, message, capsys):
    assert train(*words) == 2
    assert message in capsys.readouterr().err
