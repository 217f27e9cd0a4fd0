"""Folders of images: which folders are splits, which are classes, and what is said of the rest."""

import logging
import os
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cnn.config import DataConfig
from cnn.datasets import image_files
from cnn.datasets.build import build_data
from cnn.datasets.findings import Findings
from cnn.datasets.folders import list_folder
from cnn.datasets.image_files import find_images
from cnn.datasets.names import split_of
from cnn.errors import Refused


def plant(*paths):
    """Writes empty files, and folders where a path ends with "/"; "3*a/b" stands for 3 images in a/b."""
    for path in paths:
        number, star, folder = path.partition("*")
        if star and number.isdigit():
            plant(*(f"{folder}/{i}.jpg" for i in range(int(number))))
        elif path.endswith("/"):
            Path(path).mkdir(parents=True, exist_ok=True)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()


def listed(root="photos", layout="auto", findings=None, **options):
    """Returns {split: {class: number of images}}."""
    cfg = DataConfig("folder", root, layout=layout)
    found = list_folder(cfg, findings or Findings(), **options)
    return {split: dict(Counter(label for _, label, _ in items)) for split, items in found.items()}


def refusal(root="photos", layout="auto", **options):
    with pytest.raises(Refused) as caught:
        listed(root, layout, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and message.startswith("data.")
    return message


# ---------------------------------------------------------------------------------------------
# Names of splits

SPLITS = {
    "train": "train Training TRAIN Train_Data train_set trainset train-images images_train trains"
    " dataset_train 01_train 1-train train2017 TrainImages seg_train 训练 训练集 训练数据 訓練資料 01训练集",
    "val": "val Valid validation VAL_IMAGES val2017 dev dev_set 验证 验证集 验证图片 2-val",
    "test": "test tests Testing test_data test-set testset data_test holdout 测试 测试集 测试数据集 测试样本",
    None: "test_tube valve trainers valley contest latest protest train_driver tester invalid evaluate"
    " tested trainee 测试管 训练师 cat 猫 set data images 1 _ develop testament vals_x",
}


@pytest.mark.parametrize(
    "split, name", [(split, name) for split, names in SPLITS.items() for name in names.split()]
)
def test_a_split_is_known_by_its_usual_names(split, name):
    assert split_of(name) == split


# ---------------------------------------------------------------------------------------------
# Folders that are understood

C = {"cat": 2, "dog": 2}
UNDERSTOOD = {
    "classes": (["2*cat", "2*dog"], {"train": C}),
    "splits": (["2*train/cat", "2*train/dog", "2*val/cat"], {"train": C, "val": {"cat": 2}}),
    "usual names": (
        ["2*Train_Data/cat", "2*Train_Data/dog", "2*测试集/dog", "2*valid2/cat"],
        {"train": C, "test": {"dog": 2}, "val": {"cat": 2}},
    ),
    "train alone": (["2*training/cat", "2*training/dog"], {"train": C}),
    "a class like a split": (["1*test_tube", "2*beaker"], {"train": {"test_tube": 1, "beaker": 2}}),
    "classes like splits": (["1*valve", "1*trainers"], {"train": {"valve": 1, "trainers": 1}}),
    "a class train": (["1*train", "2*bus"], {"train": {"train": 1, "bus": 2}}),
    "deep classes by year": (["2*cat/2019/03", "2*dog/2020/03"], {"train": C}),
    "deep classes by the same years": (
        ["1*cat/2019", "1*cat/2020", "1*dog/2019", "1*dog/2020"],
        {"train": C},
    ),
    "deep classes, one folder each": (["2*cat/images", "2*dog/images"], {"train": C}),
    "deep classes with images of their own": (
        ["1*cat", "1*cat/old", "1*dog", "1*dog/old", "1*cow"],
        {"train": C | {"cow": 1}},
    ),
    "deep classes by patient": (["1*cat/P1", "1*cat/P2", "2*dog/P3"], {"train": C}),
    "one class deep": (["2*cat", "1*dog/pug", "1*dog/poodle"], {"train": C}),
    "deep classes in splits": (
        ["2*train/cat/2019/1", "2*train/dog/2020/1", "2*test/dog"],
        {"train": C, "test": {"dog": 2}},
    ),
    "one class of val, deep": (
        ["2*train/cat", "2*train/dog", "1*val/cat/a", "1*val/cat/b"],
        {"train": C, "val": {"cat": 2}},
    ),
    "half of the classes deep, with the same folders": (
        ["2*a", "2*b", "1*cat/x", "1*cat/y", "1*dog/x", "1*dog/y"],
        {"train": {"a": 2, "b": 2} | C},
    ),
    "a misspelt split": (["2*train/cat", "2*train/dog", "1*tset/cat"], {"train": C}),
    "a name with a sign": (
        ["1*$5", "1*#1", "1*_other"],
        {"train": {"$5": 1, "#1": 1, "_other": 1}},
    ),
    "system folders": (
        [
            "2*cat",
            "2*dog",
            *(
                f"1*{name}"
                for name in (
                    ".thumbnails",
                    ".Trash-1000/files",
                    "$RECYCLE.BIN",
                    "System Volume Information",
                    "__MACOSX/cat",
                    ".ipynb_checkpoints",
                    "@eaDir",
                    "#recycle",
                    "lost+found",
                    ".git",
                    "cat/.ipynb_checkpoints",
                    "cat/@eaDir/0.jpg",
                    "dog/__MACOSX/dog",
                    "dog/.AppleDouble",
                )
            ),
        ],
        {"train": C},
    ),
    "empty system folders": (["2*cat", "2*dog", "lost+found/", ".git/", "@eaDir/"], {"train": C}),
    "resource forks": (["2*cat", "2*dog", "cat/._0.jpg", "dog/Thumbs.db"], {"train": C}),
    "splits in system folders": (["2*cat", "2*dog", "1*__MACOSX/train/cat"], {"train": C}),
}


@pytest.mark.parametrize("tree, expected", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_a_folder_is_understood(tree, expected):
    plant(
        *(f"photos/{path}" if "*" not in path else path.replace("*", "*photos/") for path in tree)
    )
    assert listed() == expected


CHOSEN = {
    "splits as classes": (
        "classes",
        ["1*train/cat", "1*train/dog", "2*test/x"],
        {"train": {"train": 2, "test": 2}},
    ),
    "images beside as classes": (
        "classes",
        ["1*train", "1*test"],
        {"train": {"train": 1, "test": 1}},
    ),
    "sites as classes": ("classes", ["1*a/cat", "1*a/dog", "2*b/cat"], {"train": {"a": 2, "b": 2}}),
    "a train of trains": (
        "splits",
        ["2*train/steam", "1*train/diesel", "3*bus"],
        {"train": {"steam": 2, "diesel": 1}},
    ),
    "classes of folds": ("classes", ["1*fold1", "1*fold2"], {"train": {"fold1": 1, "fold2": 1}}),
    "the same folders in a split": (
        "splits",
        ["1*train/cat/a", "1*train/cat/b", "1*train/dog/a"],
        {"train": {"cat": 2, "dog": 1}},
    ),
}


@pytest.mark.parametrize("layout, tree, expected", CHOSEN.values(), ids=CHOSEN)
def test_the_setting_chooses_a_reading(layout, tree, expected):
    plant(*(path.replace("*", "*photos/") for path in tree))
    assert listed(layout=layout) == expected


# ---------------------------------------------------------------------------------------------
# Folders that are refused

READINGS = "data.layout=classes"
REFUSED = {
    "class, then split": (
        ["3*cat/train", "1*cat/val", "3*dog/train", "1*dog/val"],
        [
            "ROOT/CLASS/SPLIT",
            "cat (4)",
            "train (6)",
            "move the images to ROOT/SPLIT/CLASS",
            "data.name=csv",
            READINGS,
        ],
    ),
    "sites": (
        ["2*siteA/cat", "1*siteA/dog", "2*siteB/cat", "1*siteB/dog"],
        ["siteA (3)", "cat (4), dog (2)", READINGS, "data.name=csv"],
    ),
    "sites with strays": (
        ["20*a/cat", "20*a/dog", "1*a", "20*b/cat", "20*b/dog"],
        ["a (41)", "cat (40)", READINGS],
    ),
    "sites and a flat folder": (
        ["1*a/cat", "1*a/dog", "1*b/cat", "1*b/dog", "1*extra"],
        ["a (2)", "cat (2)", READINGS],
    ),
    "finer classes": (
        ["1*animals/cat", "1*animals/dog", "1*plants/rose", "1*plants/oak"],
        ["animals (2)", "rose (1)", READINGS],
    ),
    "sites in splits": (
        ["1*train/a/cat", "1*train/a/dog", "1*train/b/cat", "1*train/b/dog"],
        ["ROOT/train/CLASS", "a (2)", "cat (2)", "data.layout=splits"],
    ),
    "a train of trains": (
        ["2*train/steam", "1*train/diesel", "3*bus", "4*plane"],
        ["steam (2)", "bus (3)", "data.layout=splits", READINGS],
    ),
    "test without class folders": (
        ["2*train/cat", "2*train/dog", "3*test"],
        ["expected class folders", "photos/test", "3 images"],
    ),
    "splits without class folders": (
        ["train/cat_0.jpg", "train/dog_0.jpg", "test/1.jpg"],
        ["train", "class folders", "data.name=csv", READINGS],
    ),
    "test beside classes": (
        ["2*cat", "2*dog", "3*test"],
        ["has cat, dog, test, no train", READINGS],
    ),
    "an empty split beside classes": (["2*cat", "2*dog", "val/"], ["has cat, dog, val, no train"]),
    "splits beside classes": (
        ["2*cat", "2*dog", "2*test/cat"],
        ["has cat, dog, test, no train", READINGS],
    ),
    "two for one split": (
        ["1*train/cat", "1*val/cat", "1*valid/cat"],
        ["several folders for one split: train (train), val (val), valid (val)", READINGS],
    ),
    "train twice": (
        ["1*train/cat", "1*train2/cat"],
        ["several folders for one split: train (train), train2 (train)"],
    ),
    "a level too high": (["2*photos/cat", "2*photos/dog"], ["name it: data.root=photos/photos"]),
    "two levels too high": (["2*a/b/cat", "2*a/b/dog", "a/notes.txt"], ["data.root=photos/a/b"]),
    "splits a level too high": (
        ["2*Data/Train_Data/cat", "2*Data/Train_Data/dog"],
        ["only photos/Data, which", "name it: data.root=photos/Data", "Train_Data"],
    ),
    "a level too high in a split": (
        ["1*seg_train/seg_train/cat", "1*seg_train/seg_train/dog"],
        ["only photos/seg_train/seg_train", "cat (1)", "move its folders up"],
    ),
    "flat": (
        ["cat_0.jpg", "dog_0.jpg"],
        ["2 images", "into class folders", "data.name=csv", "path,label", "cat_1.jpg,cat"],
    ),
    "flat without classes in the names": (
        ["IMG_0.jpg", "IMG_1.jpg"],
        ["2 images", "data.name=csv"],
    ),
    "folds": (["1*fold1/cat", "1*fold2/cat"], ["folds (fold1, fold2)", "data.name=csv", READINGS]),
    "folds and test": (
        ["1*Fold_1/cat", "1*Fold_2/cat", "1*test/cat"],
        ["Fold_1", "ROOT/val/CLASS"],
    ),
    "folds of images": (["1*第1折", "1*第2折"], ["folds (第1折, 第2折)"]),
    "folds in classes": (
        ["1*cat/f/fold1", "1*cat/fold1", "1*cat/fold2", "1*dog/fold1"],
        ["in folds (fold1, fold2)"],
    ),
    "empty": ([], ["expected class folders", "photos has none, and 0 images"]),
    "an empty class": (["1*cat", "dog/"], ["the class folder has no images: photos/dog (.jpg"]),
    "many empty classes": (
        ["1*cat", *(f"c{i}/" for i in range(9))],
        ["has no images: photos/c0, photos/c1", "and 4 more"],
    ),
    "only system folders": (["1*__MACOSX/cat", "1*.git"], ["photos has none, and 0 images"]),
}


@pytest.mark.parametrize("tree, parts", REFUSED.values(), ids=REFUSED)
def test_a_folder_is_refused_with_what_to_do(tree, parts):
    plant("photos/", *(p.replace("*", "*photos/") if "*" in p else f"photos/{p}" for p in tree))
    message = refusal()
    assert all(part in message for part in parts), message
    assert "data.folds" not in message


def test_a_class_folder_whose_name_is_no_text_is_refused_and_shown():
    plant("2*photos/cat")
    os.makedirs(b"photos/\xd6\xd0")
    Path(os.fsdecode(b"photos/\xd6\xd0/0.jpg")).touch()
    message = refusal()
    assert r"\xd6\xd0 in photos" in message and "rename them" in message
    message.encode()


@pytest.mark.parametrize(
    "name, advice",
    [("a.zip", "unpack archives"), ("a.tar.gz", "unpack archives"), ("a.csv", "data.name=csv")],
)
def test_a_file_instead_of_a_folder_is_refused_with_what_to_do(name, advice):
    plant(name)
    assert f"/{name}; " in refusal(name) and advice in refusal(name)


def test_a_layout_of_splits_without_a_split_is_refused():
    plant("1*photos/cat", "1*photos/dog")
    assert "photos has cat, dog" in refusal(layout="splits")


def test_an_evaluation_of_one_class_is_understood():
    plant("1*photos/cat", "1*photos/cat/old")
    assert listed(needs_train=False) == {"train": {"cat": 2}}


def test_an_evaluation_needs_no_train():
    plant("2*photos/test/cat", "1*photos/test/dog")
    assert listed(needs_train=False) == {"test": {"cat": 2, "dog": 1}}


# ---------------------------------------------------------------------------------------------
# What is left out


def test_what_is_left_out_is_counted_in_one_line_with_all_paths(caplog):
    plant(
        "2*photos/train/cat",
        "2*photos/train/dog",
        "photos/top.jpg",
        "photos/train/loose.png",
        "photos/d.xyz",
    )
    plant("photos/train/cat/a.txt", "photos/train/dog/b.TXT", "photos/train/dog/c.xyz")
    plant(
        "photos/train/cat/Thumbs.db", "photos/train/cat/.DS_Store", "photos/train/dog/desktop.ini"
    )
    findings = Findings()
    listed(findings=findings)
    ((line, details),) = findings.found.items()
    expected = "images beside the class folders (2), *.xyz (2), *.txt (2); used are"
    assert line.startswith(f"photos: left out: {expected}")
    names = [
        "d.xyz",
        "top.jpg",
        "train/cat/a.txt",
        "train/dog/b.TXT",
        "train/dog/c.xyz",
        "train/loose.png",
    ]
    assert sorted(details) == names


def test_a_folder_that_is_left_out_is_named_with_what_to_do(caplog):
    plant("2*photos/train/cat", "1*photos/val/cat", "1*photos/tset/cat")
    listed()
    assert "photos: left out: tset/ (1); used are train/, val/ and test/" in caplog.text


def test_a_class_with_the_name_of_a_split_is_told(caplog):
    caplog.set_level(logging.INFO)
    plant("1*photos/train", "1*photos/bus")
    listed()
    assert "photos: train has no class folders, so it is a class" in caplog.text


def test_heic_images_without_their_package_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_files.add_heif.cache_clear()
    image_files.image_endings.cache_clear()
    plant("2*photos/cat", "2*photos/dog", "photos/cat/a.HEIC")
    findings = Findings()
    listed(findings=findings)
    assert "pip install pillow-heif" in next(iter(findings.found))
    plant("photos/cow/a.heic")
    assert "has no images: photos/cow" in refusal() and "pip install pillow-heif" in refusal()
    ((_, reason),) = find_images(["photos/cow"])
    assert "pip install pillow-heif" in reason


def test_heic_images_are_read_with_their_package(monkeypatch):
    def register_heif_opener():
        Image.register_open("HEIF", None)
        Image.register_extension("HEIF", ".heic")

    fake = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    Image.init()
    for name in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    image_files.add_heif.cache_clear()
    image_files.image_endings.cache_clear()
    plant("photos/cat/a.heic", "1*photos/dog")
    try:
        assert listed() == {"train": {"cat": 1, "dog": 1}}
    finally:
        image_files.add_heif.cache_clear()
        image_files.image_endings.cache_clear()


def test_every_raster_format_of_pillow_is_an_image_and_no_other():
    endings = image_files.image_endings()
    assert {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
    } <= endings
    assert {".ppm", ".pgm", ".jp2", ".j2k", ".tga", ".pcx", ".mpo"} <= endings
    assert not endings & {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".emf", ".h5", ".grib", ".txt"}
    image = Image.new("RGB", (8, 8))
    plant("photos/cat/", "1*photos/dog")
    for ending in (".jfif", ".TGA", ".dib", ".jp2"):
        image.save(f"photos/cat/a{ending}")
    assert listed() == {"train": {"cat": 4, "dog": 1}}


# ---------------------------------------------------------------------------------------------
# Links


def test_links_are_followed_but_no_folder_is_read_twice_and_none_for_ever():
    plant("2*pool/cat", "3*photos/dog", "1*photos/cow")
    Path("photos/cat").symlink_to("../pool/cat")
    Path("photos/dog/again").symlink_to("../dog")
    Path("photos/dog/up").symlink_to("../../photos")
    Path("photos/cow/a.jpg").symlink_to("../../pool/cat/0.jpg")
    assert listed() == {"train": {"cat": 2, "cow": 2, "dog": 3}}


# ---------------------------------------------------------------------------------------------
# Names of classes


def real(*folders, number=4):
    """Writes images that decode."""
    for index, folder in enumerate(folders):
        Path(folder).mkdir(parents=True)
        for i in range(number):
            Image.new("L", (4, 4), 10 * index + i).save(f"{folder}/{i}.png")


def build():
    return build_data(DataConfig("folder", "photos", on_duplicate="ignore"), 0)


def test_classes_that_differ_only_in_case_are_told(caplog):
    real("photos/Cat", "photos/cat", "photos/dog")
    assert build().classes == ["Cat", "cat", "dog"]
    assert "differ only in case, taken as different classes: Cat and cat" in caplog.text


def test_classes_that_differ_only_in_their_unicode_form_are_refused():
    real("photos/caf\u00e9", "photos/cafe\u0301", "photos/dog")
    with pytest.raises(Refused, match="forms of a character or number: .* and "):
        build()


@pytest.mark.parametrize(
    "train, val", [("cat", "Cat"), ("caf\u00e9", "cafe\u0301"), ("cat", "cats")]
)
def test_a_class_that_train_has_not_is_told_with_the_one_that_may_be_meant(train, val):
    real(f"photos/train/{train}", "photos/train/dog", f"photos/val/{val}")
    with pytest.raises(Refused, match=f"train has not: {val} — did you mean '{train}'"):
        build()


# ---------------------------------------------------------------------------------------------
# predict.py and the settings


def found_by(*words):
    return [str(path) for path, reason in find_images(words) if reason is None]


def test_a_prediction_searches_no_system_folders_unless_they_are_typed():
    hidden = [
        f"photos/{name}/x.jpg" for name in ("@eaDir", "__MACOSX", "lost+found", ".thumbnails")
    ]
    plant("photos/a.jpg", "photos/._a.jpg", "photos/sub/b.JFIF", *hidden)
    assert found_by("photos") == ["photos/a.jpg", "photos/sub/b.JFIF"]
    assert found_by("photos/**/*.jpg") == ["photos/a.jpg"]
    assert found_by("photos/*") == ["photos/a.jpg", "photos/sub/b.JFIF"]
    for path in hidden:
        assert found_by(path) == found_by(os.path.dirname(path)) == [path]
        assert found_by(f"{os.path.dirname(path)}/*") == [path]
    assert found_by("photos/.thumb*/*") == ["photos/.thumbnails/x.jpg"]
    assert found_by("photos/._a.jpg") == ["photos/._a.jpg"]


def test_a_folder_is_not_searched_by_a_dataset_without_files(caplog):
    build_data(DataConfig("digits", "photos"), 0)
    said = "data.root: photos is not used by data.name=digits; data.name=folder reads a folder"
    assert said in caplog.text


def test_masks_of_a_segmentation_are_told(caplog):
    for folder in ("photos/cat", "photos/dog"):
        real(folder)
    for path in list(Path("photos/cat").iterdir())[:2]:
        mask = Image.open(path).rotate(90).convert("L").point(lambda value: value // 2)
        mask.save(path.with_name(f"{path.stem}_mask.png"))
    build()
    assert "2 images named like masks; a mask is no picture of a class" in caplog.text


def test_parts_of_a_download_with_a_folder_between_are_no_classes():
    for part, names in (("part1", ["cat", "dog"]), ("part2", ["cow", "hen"])):
        for name in names:
            real(f"photos/{part}/photos/{name}")
    with pytest.raises(Refused, match=r"can be read as ROOT/CLASS with .*part1.*, or as .*cat"):
        build()


def test_a_class_that_is_a_link_to_another_class_is_refused_for_its_copies():
    real("photos/cat", "photos/dog")
    Path("photos/feline").symlink_to("cat", target_is_directory=True)
    with pytest.raises(Refused, match="under several classes"):
        build_data(DataConfig("folder", "photos"), 0)
