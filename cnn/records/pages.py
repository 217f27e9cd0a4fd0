"""HTML pages from the templates beside this file, and metrics as their tables show them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from cnn.metrics import scores

CLASS_HEAD = ["class", "precision", "recall", "specificity", "F1", "images"]


def render(template: str, **content: Any) -> str:
    """Returns the page of a file in templates/; text in the content is escaped."""
    import jinja2  # a requirement of torch

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["metric"] = format_metric
    return pages.get_template(template).render(content)


def format_metric(value: float | None) -> str:
    """Formats with four digits, whole numbers as they are, and n/a for undefined values."""
    if value is None or math.isnan(value):
        return "n/a"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value > 1e-3 else f"{value:.3g}"


def class_rows(matrix: np.ndarray, classes: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the table rows of a confusion matrix: one per class, and two of means over them."""
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
