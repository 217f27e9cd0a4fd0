"""HTML pages from the files in templates/, and metrics as the tables of these pages show them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from cnn.metrics import scores

CLASS_HEAD = ["class", "precision", "recall", "specificity", "F1", "images"]


def render(template: str, **content: Any) -> str:
    """Returns the text of an HTML page, made from a template.

    Args:
        template: the name of a file in cnn/records/templates, such as "report.jinja".
        content: the value of each variable in the template. Characters with a meaning in HTML, such
            as "<", are escaped.
    """
    import jinja2  # a requirement of torch

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["metric"] = format_metric
    return pages.get_template(template).render(content)


def format_metric(value: float | None) -> str:
    """Formats a metric for a table.

    Args:
        value: the metric. None and NaN mean that the metric is undefined.

    Returns:
        "n/a" for an undefined metric. An int is written in full. A float from 0.001 to 1000 has
        four decimals, such as "0.9833". A smaller one has three significant digits, as "0.000123",
        and a larger one no decimals.
    """
    if value is None or math.isnan(value):
        return "n/a"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if 1e-3 < value < 1e3 else f"{value:.3g}" if value < 1 else f"{value:.0f}"


def class_rows(matrix: np.ndarray, classes: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the rows of a table with the metrics of each class.

    The columns are the class name, precision, recall, specificity, F1 and the number of images.

    Args:
        matrix: the confusion matrix, integers of shape (classes, classes). Each row is a true
            class. Each column is a predicted class.
        classes: the names of the classes, in the order of the matrix.

    Returns:
        Two lists of rows. A row is a list with a text per column. The first list has a row per
        class. The second list has two rows. The first of the two has the mean over the classes. The
        second has the mean weighted by the number of images of each class.
    """
    values = scores.per_class(matrix)
    support = values.pop("support")
    columns, total = list(values.values()), f"{support.sum()}"
    rows = [
        [name, *map(format_metric, metrics), f"{count}"]
        for name, count, *metrics in zip(classes, support, *columns, strict=True)
    ]
    means = [
        ["mean", *(format_metric(scores.macro(c)) for c in columns), total],
        ["weighted", *(format_metric(scores.weighted(c, support)) for c in columns), total],
    ]
    return rows, means
