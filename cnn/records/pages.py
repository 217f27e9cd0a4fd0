"""HTML pages, from the templates beside this file; and figures as their tables show them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from cnn.metrics import scores

CLASS_HEAD = ["class", "precision", "recall", "specificity", "F1", "images"]


def render(template: str, **content: Any) -> str:
    """A page of templates/; what is text in the content is escaped."""
    import jinja2  # torch brings it along

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(content)


def format_metric(value: float | None) -> str:
    """Four digits, whole numbers as they are, n/a where there is nothing."""
    if value is None or math.isnan(value):
        return "n/a"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value > 1e-3 else f"{value:.3g}"


def class_rows(matrix: np.ndarray, classes: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Table rows for each class, and for the means over them."""
    values = scores.per_class(matrix)
    support = values.pop("support")
    rows = [
        [name, *(format_metric(column[number]) for column in values.values()), f"{support[number]}"]
        for number, name in enumerate(classes)
    ]
    macro = [scores.macro(column) for column in values.values()]
    weighted = [scores.weighted(column, support) for column in values.values()]
    means = [
        [name, *map(format_metric, figures_), f"{support.sum()}"]
        for name, figures_ in (("mean", macro), ("weighted", weighted))
    ]
    return rows, means
