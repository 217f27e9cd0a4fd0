"""HTML pages from the files in templates/, and metrics as the tables of these pages show them."""

from pathlib import Path
from typing import Any

import numpy as np

from cnn.metrics import scores
from cnn.metrics.scores import format_metric

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
