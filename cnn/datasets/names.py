"""The names of splits and classes: what they stand for, and which look alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from logging import WARNING

from cnn.datasets.findings import Findings
from cnn.errors import Refused
from cnn.utils.screen import list_some

SPLIT_NAMES = {
    "train": r"train(ing|s)?|训练|訓練",
    "val": r"val(id|idation|s)?|dev|development|验证|驗證|校验",
    "test": r"test(ing|s)?|hold-?out|held-?out|测试|測試",
}
# What can stand before and after the name of a split, in any number, as in test_images and 训练集.
BESIDE = (
    r"(?:data|sets?|images?|imgs?|photos?|pictures?|pics?|samples?|splits?|subsets?|parts?"
    r"|folders?|files?|seg|数据|資料|集|样本|樣本|图片|图像|圖片|照片|用|[\W\d_])*"
)
NUMBER = re.compile(r"[-+]?\d{1,15}(\.\d*)?(e[-+]?\d\d?)?", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for, or None.

    Args:
        name: the name of a folder, or a cell of a table, such as "Validation", "01_train_images" or
            "测试集".

    Returns:
        "train", "val" or "test". None if the name is not the name of a split.
    """
    name = unicodedata.normalize("NFKC", name).lower()
    for split, names in SPLIT_NAMES.items():
        if re.fullmatch(f"{BESIDE}(?:{names}){BESIDE}", name):
            return split
    return None


def check_labels(where: str, labels: dict[str, str], findings: Findings) -> None:
    """Checks that different labels mean different classes.

    Args:
        where: the CSV file or the folder with the labels, for messages.
        labels: a dict from each label to the text that names the label, such as "cat (line 3)".
        findings: gets the labels that differ only in case.

    Raises:
        Refused: labels look the same, such as two forms of "é", or are the same number.
    """
    alike = f"{where}: labels that differ only in"
    if same := _groups(labels, _appearance):
        forms = "spaces or in forms of a character or number"
        raise Refused(f"{alike} {forms}: {same}; write each label in one way")
    if same := _groups(labels, lambda label: _appearance(label).casefold()):
        findings.add(f"{alike} case, taken as different classes: {same}", level=WARNING)


def _groups(labels: dict[str, str], key: Callable[[str], str]) -> str:
    """Names the labels for which `key` returns the same as for another label."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label, text in labels.items():
        groups[key(label)].append(text)
    return list_some([" and ".join(group) for group in groups.values() if len(group) > 1])


def _appearance(label: str) -> str:
    """Returns a text that is equal for labels that look the same or are the same number."""
    visible = "".join(sign for sign in label if unicodedata.category(sign) != "Cf")
    shown = " ".join(unicodedata.normalize("NFKC", visible).split())
    return f"{float(shown)}" if NUMBER.fullmatch(shown) else shown
