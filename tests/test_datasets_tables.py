"""Tables: which CSV files are taken, what of them is used, and what is refused in which words."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn.config import DataConfig
from cnn.datasets.build import build_data, read_splits
from cnn.datasets.findings import Findings
from cnn.errors import Refused

IMAGES = ("a.png", "b.png", "c.png", "d.png", "cats/e.png", "图片/f.png", "g.jpg", "h", "i\\j.png")


@pytest.fixture(autouse=True)
def top(tmp_path, monkeypatch):
    """The folder of the tables, with a few images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos" / "set"
    for number, name in enumerate(IMAGES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
    return folder


def read(top, text, encoding="utf-8", **settings):
    """What a table of this text gives: the images with their labels by split, and the findings."""
    (top / "table.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    findings = Findings()
    cfg = DataConfig("csv", str(top / "table.csv"), **settings)
    splits, classes = read_splits(cfg, findings)
    images = {
        split: " ".join(
            f"{Path(part.name(i)).relative_to(top).as_posix()}:{classes[part.labels[i]]}"
            for i in range(len(part))
        )
        for split, part in splits.items()
    }
    return images, [line.removeprefix(f"{top}/") for line in findings.found]


def refusal(top, text, encoding="utf-8", **settings):
    with pytest.raises(Refused) as caught:
        read(top, text, encoding, **settings)
    assert len(str(caught.value).splitlines()) == 1, "one line"
    return str(caught.value)


TWO = {"train": "a.png:x b.png:y"}
THREE = {"train": "a.png:x b.png:y", "test": "c.png:x"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("path,label\na.png,x\nb.png,y\n", TWO),
        ("Path,LABEL,Split\na.png,x,train\nb.png,y,TRAIN\nc.png,x,Test\n", THREE),
        ("File Name,Class,Subset\na.png,x,train\nb.png,y,\nc.png,x,test\n", THREE),
        ("filepaths,labels,data set\na.png,x,train\nb.png,y,train\nc.png,x,test\n", THREE),
        ("image-id,category,set\na.png,x,train\nb.png,y,train\nc.png,x,test\n", THREE),
        ("文件名,标签,数据集\na.png,x,train\nb.png,y,train\nc.png,x,test\n", THREE),
        ("图片路径,类别,划分\na.png,x,train\nb.png,y,train\nc.png,x,test\n", THREE),
        ("label,path\nx,a.png\ny,b.png\n", TWO),
        ("path;label;split\na.png;x;train\nb.png;y;train\nc.png;x;test\n", THREE),
        ("path\tlabel\tsplit\na.png\tx\ttrain\nb.png\ty\t\nc.png\tx\ttest\n", THREE),
        ("\ufeffpath,label\r\na.png,x\r\n\r\nb.png,y\r\n,\r\n  , \r\n\r\n", TWO),
        ("path,label\ra.png,x\rb.png,y\r", TWO),
        ('path, label\n"a.png", "x"\n b.png , y \n', TWO),
        ('path,label\na.png,"x, or ""z"""\nb.png,y', {"train": 'a.png:x, or "z" b.png:y'}),
        ("path,label\ncats\\e.png,x\n.\\b.png,y\n", {"train": "cats/e.png:x b.png:y"}),
        ("path,label\ni\\j.png,x\nh,y\n图片/f.png,x\n", {"train": "i\\j.png:x h:y 图片/f.png:x"}),
        ("path,label\na.png,10\nb.png,2\n", {"train": "a.png:10 b.png:2"}),
        ("path,label\na.png,none\nb.png,nano\n", {"train": "a.png:none b.png:nano"}),
    ],
)
def test_a_table_that_is_understood_is_taken_without_a_word(text, expected, top):
    assert read(top, text) == (expected, [])


@pytest.mark.parametrize(
    "text, expected, said",
    [
        (
            "path,label,age,sex,fold\na.png,x,1,f,0\nb.png,y,2,m,1\n",
            TWO,
            ["3 columns not used: age, sex, fold"],
        ),
        (",path,label\n0,a.png,x\n1,b.png,y\n", TWO, ["1 column not used: (no name)"]),
        (
            "path,label\n./a.png,x\nb.png,y\na.png,x\n",
            {"train": "a.png:x b.png:y a.png:x"},
            ["1 image with copies in the same split"],
        ),
        (
            "path,label,notes\na.png,x,\"two\nlines; and 'more'\"\nb.png,y,\n",
            TWO,
            ["1 column not used: notes"],
        ),
        (
            "path,label\na.png,cat\nb.png,Cat\nc.png,dog\nd.png,cat\n",
            {"train": "a.png:cat b.png:Cat c.png:dog d.png:cat"},
            ["differ only in case, taken as different classes: cat (line 2) and Cat (line 3)"],
        ),
    ],
)  # fmt: skip
def test_what_may_not_be_meant_is_taken_and_said_in_one_line(text, expected, said, top):
    images, lines = read(top, text)
    assert images == expected and len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines)), lines


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "table.csv:1: expected a CSV file in UTF-8 with the columns path,label[,split], got ''; name them so"),
        ("sep=;\npath;label\na.png;x\nb.png;y\n", "got 'sep=;'; name them so"),
        ("\n\n", "table.csv:1: expected a CSV file in UTF-8 with the columns path,label[,split], got ''; name them so"),
        ("a.png,x\nb.png,y\n", "table.csv:1: expected a CSV file in UTF-8 with the columns path,label[,split], got 'a.png,x'"),
        ("path|label\na.png|x\n", "got 'path|label'"),
        ('[{"path": "a.png"}]', "a CSV file in UTF-8 with the columns"),
        ("path,cat,dog\na.png,1,0\nb.png,0,1\n", "got 'path,cat,dog'; name them so"),
        ("path,label,Path\na.png,x,b.png\n", "csv:1: several columns for path, got 'path,label,Path';"),
        ("file,path,label\n1,b.png,x\n", "several columns for path, got 'file,path,label'; rename all"),
        ("path,label,class\na.png,x,y\n", "several columns for label, got 'path,label,class'; rename"),
        ("path,label\n", "no line below the columns"),
        ("path,label,split\na.png,x,test\nb.png,y,val\n", "no line below the columns is for train"),
        ("path,label,split\na.png,x\nb.png,y,val\nc.png\n",
         "table.csv: rows that cannot be used: 2 with fewer cells than the header: line 2 ('a.png,x'), line 4 ('c.png')"),
        ("path,label\na.png,x\ncats,e.png,y\n",
         "1 with more cells than the header (a comma in a path without quotes?): line 3 ('cats,e.png,y')"),
        ("path;label\na.png;x\nb.png,y\n", "1 with fewer cells than the header: line 3 ('b.png,y')"),
        ("path,label\na.png,x\n,y\n  ,x\n", "2 with no path: line 3 (',y'), line 4 (',x')"),
        ("path,label\na.png,x\n\n\nb.png,\nc.png, \n", "2 with no label: line 5 ('b.png,'), line 6 ('c.png,')"),
        ("path,label\na.png,x\nb.png,NaN\nc.png,??\nd.png,<NA>\n", "3 with no label: line 3 ('b.png,NaN'), line 4 ('c.png,??'), line 5"),
        ("path,label\n" + "a.png,\n" * 12, "12 with no label: line 2 ('a.png,'), line 3 ('a.png,'),"),
        ("path,label\na.png,\nb.png\n",
         "1 with no label: line 2 ('a.png,'); 1 with fewer cells than the header: line 3"),
        ("path,label,split\na.png,x,tarin\nb.png,y,train\nc.png,y,tarin\nd.png,x,1\n",
         "3 with a split other than train, val and test: line 2 ('a.png,x,tarin'), line 4"),
        ('path,label\na.png,x\n"b.png,y\nc.png,x\nd.png,y\n', "csv:3: quotes that do not match"),
        ('path,label\na.png,"x\nb.png,y\nc.png,"x"\n', "csv:2: quotes that do not match"),
        ('path,label\na.png,"x\nb.png,y"\n', "a line break or a zero byte (a quote that is not closed?)"),
        ("path,label\na.png,1\nb.png,2\nc.png,1.0\n", "a character or number: 1 (line 2) and 1.0 (line 4); write each label"),
        ("path,label\na.png,1\nb.png,2\nc.png,01\n", "1 (line 2) and 01 (line 4)"),
        ("path,label\na.png,red cat\nb.png,red  cat\n", "red cat (line 2) and red  cat (line 3)"),
        ("path,label\na.png,red cat\nb.png,red\u3000cat\n", "differ only in spaces"),
        ("path,label\na.png,caf\u00e9\nb.png,cafe\u0301\n", "in forms of a character"),
        ("path,label\na.png,cat\nb.png,cat\u200b\n", "(line 2) and cat\u200b (line 3)"),
        ("path,label\na.png,cat\nb.png,ｃat\n", "cat (line 2) and ｃat (line 3)"),
        ("path,label\na.png,x\na.png,y\n", "line 3 (a.png is y in train, but line 2 says x in train)"),
        ("path,label,split\na.png,x,train\nb.png,y,\n.\\a.png,x,test\n",
         "for the same image: line 4 (.\\a.png is x in test, but line 2 says x in train)"),
        ("path,label\na.png,x\nb.png,x\n", "at least two classes"),
        ("path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,val\n", "train has not: z"),
        ("path,label\na.png,x\nb\0.png,y\n", "a zero byte (a quote that is not closed?): line 3 ("),
        ("path,label\na.png,x\nb.png,y\0\n", "a zero byte (a quote that is not closed?): line 3 ("),
        ("path,label\n" + "a.png,\n" * 12, "line 6 ('a.png,') and 7 more"),
        ("path,label\na.png,1e3\nb.png,1000.0\n", "1e3 (line 2) and 1000.0 (line 3)"),
    ],
)  # fmt: skip
def test_a_table_that_is_not_understood_is_refused_with_its_lines(text, part, top):
    assert part in refusal(top, text)


@pytest.mark.parametrize("path", ["no.png", "cats", "g", "http://example.org/z.png", "C:\\k.png"])
def test_a_path_that_leads_to_no_file_is_refused_with_where_paths_begin(path, top):
    message = refusal(top, f"path,label\na.png,x\n{path},y\nnor.png,y\n")
    assert f"line 3 ({path}), line 4 (nor.png)" in message and "used: 2 with" in message
    assert f"paths begin at {top}; data.on_bad_image=skip leaves such lines out" in message


def test_missing_files_are_left_out_where_that_is_asked_for(top):
    text = "path,label\na.png,x\nno.png,y\nb.png,y\n"
    images, lines = read(top, text, on_bad_image="skip")
    assert images == TWO and "1 image file cannot be decoded; left out" in lines[0]


@pytest.mark.parametrize("labels", ["猫 狗", "鹦鹉 鸳鸯 麻雀", "“好”猫 ——狗，花"])
def test_a_table_in_gb18030_is_read_and_the_words_are_shown(labels, top):
    rows = [f"{image},{label}" for image, label in zip(IMAGES, labels.split())]
    images, lines = read(top, "文件名,标签\n" + "\n".join(rows), "gb18030")
    assert images["train"].split() == [row.replace(",", ":") for row in rows]
    assert "table.csv: not in UTF-8, read as GB18030, with words such as 文件名, 标签" in lines[0]


@pytest.mark.parametrize(
    "labels, encoding",
    [
        ("Käse Brötchen", "cp1252"),
        ("pää jäätä", "cp1252"),
        ("собака кота", "cp1251"),
        ("貓 狗 蝴蝶花", "big5"),
        ("猫 カタカナ", "cp932"),
    ],
)
def test_a_table_in_another_encoding_is_refused_with_what_to_do(labels, encoding, top):
    rows = [f"{image},{label}" for image, label in zip(IMAGES, labels.split())]
    message = refusal(top, "path,label\n" + "\n".join(rows), encoding)
    assert "in UTF-8, but 0x" in message and "save it as UTF-8 (in Excel:" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_table_in_utf16_is_refused_with_what_to_do(encoding, top):
    message = refusal(top, "path,label\na.png,x\nb.png,y\n", encoding)
    assert "table.csv" in message and "in UTF-8" in message


def test_what_is_no_text_or_no_file_is_refused(top):
    for content in ((top / "a.png").read_bytes(), b"PK\3\4\0\0work\xff\x80"):
        assert "no character of it; save it as UTF-8 (in Excel" in refusal(top, content)
    for name in ("no.csv", "cats"):
        with pytest.raises(Refused, match="expected a CSV file at"):
            build_data(DataConfig("csv", str(top / name)), 0)


def test_a_table_without_splits_is_divided(top):
    rows = [(name, "xy"[i % 2]) for i, name in enumerate(IMAGES[:6])]
    with open(top / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    data = build_data(DataConfig("csv", str(top / "table.csv")), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 2, 2)


def test_the_paths_of_a_table_begin_at_the_table_not_at_the_command(top, monkeypatch):
    monkeypatch.chdir(top.parent)
    cfg = DataConfig("csv", os.path.join("set", "table.csv"))
    text = f"path,label\na.png,x\n{top / 'b.png'},y\n"
    (top / "table.csv").write_text(text)
    splits, _ = read_splits(cfg, Findings())
    assert [splits["train"].name(i) for i in range(2)] == ["set/a.png", str(top / "b.png")]
