"""Datasets of the user's files: a CSV file with the paths and labels of images."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path

from cnn.config import DataConfig
from cnn.datasets.findings import Findings
from cnn.datasets.listing import Listing
from cnn.datasets.names import check_labels, split_of
from cnn.errors import Refused
from cnn.utils.screen import list_some

# What the user's columns are called, in lower case and without spaces, "_" and "-".
COLUMNS = {
    "path": r"paths?|(file|image|img)(file)?(s|paths?|names?|id)?|路径|(文件|图片|图像)(名|路径)?",
    "label": r"labels?|(class|category)(name)?|target|diagnosis|dx|标签|类别|分类",
    "split": r"splits?|(sub|data)?set|partition|数据集|划分|子集|集合",
    "group": r"groups?(id|name)?|分组|组别",
}
# Columns whose pictures should perhaps not be divided.
LIKE_GROUPS = re.compile(
    r"(patient|subject|case|person|study|lesion|病人|患者|受试者|病例)(s|id|name|编号|号)?"
)
# How programs write a missing value.
NO_LABEL = ("", "nan", "na", "n/a", "<na>", "null", "#n/a", "#ref!", "#value!")
CHINESE = re.compile("[\u2010-\u2026\u3000-\u303f\u3400-\u9fff\uff00-\uffef·×]+")

Rows = Iterator[tuple[int, list[str]]]  # line number and cells


def list_table(cfg: DataConfig, findings: Findings, *, needs_train: bool = True) -> Listing:
    """Lists the images that a CSV file names.

    The CSV file has a column for the path, a column for the label and, optionally, a column for the
    split and a column for the group. A path is relative to the folder of the CSV file. A split is
    train, val or test. If the split is empty or there is no such column, the image is for training.

    Args:
        cfg: the section `data` of the settings. `cfg.root` is the CSV file.
        findings: gets the facts that the user has to know, such as columns that are not used.
        needs_train: whether training images are required.

    Returns:
        The images by split.

    Raises:
        Refused: the CSV file is not understood. Training images or files are missing. Labels seem
            to mean the same class. Two lines give one image different labels or splits.
    """
    file = Path(cfg.root)
    listing = _read_images(file, cfg, findings)
    if "train" not in listing and (needs_train or not listing):
        raise Refused(f"{file}: no line below the columns is for train")
    return listing


def _read_images(file: Path, cfg: DataConfig, findings: Findings) -> Listing:
    """Reads the rows of a CSV file.

    Raises:
        Refused: rows are not understood. The message names the lines for each kind of mistake.
    """
    columns, rows = _read_table(file, findings)
    listing: Listing = {}
    seen: dict[str, tuple[int, str]] = {}  # path: line, and label and split
    first_lines: dict[str, str] = {}  # label: the first line that has it
    mistakes: dict[str, list[str]] = defaultdict(list)  # what is wrong: lines
    advice = f"paths begin at {file.parent.resolve()}; data.on_bad_image=skip leaves such lines out"
    for line, cells in rows:
        row = dict(zip(columns, map(str.strip, cells)))
        if mistake := _mistake(row, len(cells) - len(columns)):
            mistakes[mistake].append(f"line {line} ({','.join(cells)[:50]!r})")
            continue
        path, label, split = row["path"], row["label"], split_of(row.get("split") or "train")
        # A backslash separates folders unless the name of a file contains the backslash.
        image = os.path.join(file.parent, path)
        if not os.path.isfile(image):
            image = os.path.join(file.parent, path.replace("\\", "/"))
            if not os.path.isfile(image) and cfg.on_bad_image == "stop":
                missing = f"a path that leads to no file ({advice})"
                mistakes[missing].append(f"line {line} ({path})")
        group = row.get("group") if cfg.group is None else None
        place = f"{label} in {split}" + (f" of {group}" if group else "")
        earlier, before = seen.setdefault(os.path.normpath(image), (line, place))
        if before != place:
            twice = f"line {line} ({path} is {place}, but line {earlier} says {before})"
            mistakes["another label, split or group for the same image"].append(twice)
        first_lines.setdefault(label, f"{label} (line {line})")
        listing.setdefault(split, []).append((Path(image), label, group))
    if mistakes:
        kinds = [f"{len(at):,} with {what}: {list_some(at)}" for what, at in mistakes.items()]
        raise Refused(f"{file}: rows that cannot be used: {'; '.join(kinds)}")
    check_labels(str(file), first_lines, findings)
    return listing


def _mistake(row: dict[str, str], surplus: int) -> str | None:
    """Returns what is wrong with a row, in words that follow "rows with", or None.

    Args:
        row: a dict from column to text.
        surplus: how many cells more than columns there are. The number is negative if cells lack.
    """
    path, label = row.get("path", ""), row.get("label", "")
    mistakes = {
        "more cells than the header (a comma in a path without quotes?)": surplus > 0,
        "fewer cells than the header": surplus < 0,
        "no path": not path,
        "no label": label.strip("?\ufffd").lower() in NO_LABEL,
        "no group": row.get("group", "1").lower() in NO_LABEL,
        "a line break or a zero byte (a quote that is not closed?)": {*path, *label} & {*"\n\r\0"},
        "a split other than train, val and test": not split_of(row.get("split") or "train"),
    }
    return next((what for what, is_so in mistakes.items() if is_so), None)


def _read_table(file: Path, findings: Findings) -> tuple[list[str], Rows]:
    """Reads a CSV file and recognizes the separator and the columns by the names in the header.

    The header is the first line.

    Args:
        file: the CSV file.
        findings: gets the columns that are not used, and an encoding that is not UTF-8.

    Returns:
        Two values. The first value is a list of the columns, with the names "path", "label",
        "split" and "group" for those that are used. The second value yields (line number, cells)
        for each row below the header that is not blank. Reading the rows raises Refused where
        quotes do not match.

    Raises:
        Refused: the file cannot be read, is no CSV file or is in an unknown encoding. The header
            has no column for the path or for the label, or several columns for one of them.
    """
    lines = io.StringIO(_read_text(file, findings), newline="")
    header = next(lines, "")
    for separator in "\t;,":
        names = next(csv.reader([header], delimiter=separator, skipinitialspace=True))
        columns = [_meaning(name) for name in names]
        if {"path", "label"} <= set(columns):
            break
    else:
        expected = "expected a CSV file in UTF-8 with the columns path,label[,split]"
        raise Refused(f"{file}:1: {expected}, got {header.strip()[:80]!r}; name them so first")
    if twice := [meaning for meaning in COLUMNS if columns.count(meaning) > 1]:
        fault = f"several columns for {list_some(twice)}, got {header.strip()[:100]!r}"
        raise Refused(f"{file}:1: {fault}; rename all but one")
    unused = [column or "(no name)" for column in columns if column not in COLUMNS]
    findings.add_all("column", unused, f"not used: {list_some(unused)} (only {', '.join(COLUMNS)})")
    like_groups = [name for name in unused if LIKE_GROUPS.fullmatch(_key(name))]
    if like_groups and "group" not in columns:
        advice = f"if pictures with one {like_groups[0]} belong together, name that column group"
        findings.add(f"{file}: {advice}; else they stand in train and in test", level=WARNING)
    return columns, _read_rows(file, lines, separator)


def _meaning(name: str) -> str:
    """Returns the key of COLUMNS for which a column's name stands, or else the name."""
    found = (meaning for meaning, names in COLUMNS.items() if re.fullmatch(names, _key(name)))
    return next(found, name.strip())


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _read_rows(file: Path, lines: Iterator[str], separator: str) -> Rows:
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    line = 2  # where the row begins
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield line, cells
            line = reader.line_num + 2
    except csv.Error as error:
        advice = 'close every quote, and write "" for a quote inside a cell'
        raise Refused(f"{file}:{line}: quotes that do not match ({error}); {advice}") from None


def _read_text(file: Path, findings: Findings) -> str:
    """Returns the text of a file in UTF-8 or, if the text is then Chinese, in GB18030."""
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise Refused(f"data.root: expected a CSV file at {file.resolve()}: {error}") from None
    except UnicodeDecodeError as error:
        wrong = f"{file.resolve()} in UTF-8, but {data[error.start]:#04x} is no character of it"
    text = data.decode("gb18030", "replace")
    words = list(dict.fromkeys(re.findall(r"[^\x00-\x7f]+", text)))
    advice = 'save it as UTF-8 (in Excel: Save As, "CSV UTF-8")'
    if not _is_chinese("".join(words)):
        raise Refused(f"data.root: expected a CSV file at {wrong}; {advice}")
    read = f"read as GB18030, with words such as {list_some(words)}"
    findings.add(f"{file}: not in UTF-8, {read}; if they are wrong, {advice}", level=WARNING)
    return text


def _is_chinese(text: str) -> bool:
    """Returns whether characters that were decoded from GB18030 are Chinese.

    Bytes of other encodings, such as "Käse" in cp1252, also decode from GB18030, but to rare
    characters. Most of a Chinese text is of the first level of GB 2312, bytes B0 to D7 and A1 to
    FE.
    """
    codes = [sign.encode("gb18030") for sign in text if sign != "\ufffd"]
    common = [code for code in codes if 0xB0 <= code[0] <= 0xD7 and code[1] >= 0xA1]
    return 2 * len(common) >= len(codes) and bool(CHINESE.fullmatch(text))
