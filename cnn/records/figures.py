"""Figures that are drawn with matplotlib's Figure objects, without windows or global state.

An SVG takes the colours of the page around it (`currentColor`), so that it suits light and dark
pages; a PNG is dark on white.
"""

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnn.utils.screen import shorten_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#3b82d6", "#e07b2a", "#3a9e6b"  # legible on white and on near-black
COLOURS = (BLUE, ORANGE, GREEN, "#b05cc7", "#c9485b", "#8a7a3c", "#3aa6b0", "#7d7d7d")
SVG_INK, SVG_GRID = "#010203", "#040506"  # replaced by the page's colours in the finished SVG
PNG_INK, PNG_GRID = "#222222", "#dddddd"
MAX_CLASSES_WITH_NUMBERS, MAX_CLASSES_WITH_NAMES = 20, 120
IMAGES_PER_ROW = 8
# A chart is cut off above this quantile of its values, if one is so many times higher.
USUAL, CUT_OFF = 0.8, 30
STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"

# The first of these fonts that is installed draws the letters that DejaVu Sans lacks, in a PNG.
CJK_FONTS = (
    "Noto Sans CJK SC, Noto Sans SC, Source Han Sans SC, WenQuanYi Micro Hei, SimHei,"
    " Microsoft YaHei, PingFang SC, Hiragino Sans GB, Arial Unicode MS, Noto Sans CJK JP"
)


def is_available() -> bool:
    """Returns whether matplotlib is installed, without importing matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        label: the name of the curve in the legend. None if the legend does not show the curve.
        xs: the x coordinates, such as epochs.
        ys: the y coordinate for each x coordinate. None makes a gap in the curve.
        colour: the colour in hexadecimal, such as "#3b82d6".
        dashed: whether the line is dashed.
    """

    label: str | None
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: str = BLUE
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart with curves.

    Attributes:
        title: the text above the chart.
        curves: the curves.
        marks: the x coordinates of vertical dotted lines.
        mark_label: the name of the vertical lines in the legend.
        xlabel: the label of the x axis.
        xscale: the scale of the x axis, "linear", "log", or "share" for both axes from 0 to 1.
    """

    title: str
    curves: Sequence[Curve]
    marks: Sequence[float] = ()
    mark_label: str = "resumed"
    xlabel: str = "epoch"
    xscale: str = "linear"


# -- rendering ------------------------------------------------------------------------------------


def svg(draw: Callable[..., "Figure"], *args, **kwargs) -> str:
    """Draws a figure and returns the figure as an <svg> element for HTML.

    The colours and the font of the HTML page apply to the axes and the text.

    Args:
        draw: a function that returns a figure, such as `draw_panels`.
        args: the positional arguments of `draw`.
        kwargs: the keyword arguments of `draw`.
    """
    with _style(SVG_INK, SVG_GRID):
        figure, file = draw(*args, **kwargs), io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(SVG_INK, "currentColor").replace(SVG_GRID, "var(--line)")
    return "\n".join(line.strip() for line in text.splitlines())


def panel_svgs(panels: Sequence[Panel]) -> list[str]:
    """Draws each chart as a separate figure.

    Args:
        panels: the charts.

    Returns:
        The text of an <svg> element for each chart.
    """
    return [svg(draw_panels, [panel], width=4.8, height=3.0) for panel in panels]


def png(draw: Callable[..., "Figure"], *args, mark: str | None = None, **kwargs) -> bytes:
    """Draws a figure and returns the bytes of a PNG file.

    Args:
        draw: a function that returns a figure, such as `draw_panels`.
        args: the positional arguments of `draw`.
        mark: a title that is stored in the file and not drawn; None for none.
        kwargs: the keyword arguments of `draw`.
    """
    with _style(PNG_INK, PNG_GRID):
        figure, file = draw(*args, **kwargs), io.BytesIO()
        figure.savefig(file, format="png", dpi=110, facecolor="white", metadata={"Title": mark})
    return file.getvalue()


@contextlib.contextmanager
def _style(ink: str, grid: str) -> Iterator[None]:
    from matplotlib import font_manager, style

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    installed = set(font_manager.fontManager.get_font_names())
    cjk = [name for name in CJK_FONTS.split(", ") if name in installed]
    settings = {"font.family": ["DejaVu Sans", *cjk[:1]], "grid.color": grid}
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[name] = ink
    with style.context([STYLE, settings]), warnings.catch_warnings():
        # A browser can draw the letters of an SVG that no font on this machine has.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


# -- figures: to be drawn by `svg` or `png`, which set colours and fonts ---------------------------


def draw_panels(panels: Sequence[Panel], width: float = 4.4, height: float = 3.2) -> "Figure":
    """Draws charts side by side in one figure.

    Args:
        panels: the charts, from left to right.
        width: the width of each chart in inches.
        height: the height of each chart in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _draw_panel(axes, panel)
    return figure


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    for curve in panel.curves:
        ys = np.array(curve.ys, dtype=float)  # None becomes nan
        axes.plot(
            curve.xs,
            ys,
            "--" if curve.dashed else "-",
            color=curve.colour,
            marker="o" if np.isfinite(ys).sum() <= 1 else None,  # a line needs two points
            label=re.sub("^_", " _", curve.label or ""),  # matplotlib hides names that begin with _
            gid=f"{panel.title} {curve.label}".replace(" ", "-"),
        )
    for number, x in enumerate(panel.marks):
        label = panel.mark_label if number == 0 else None
        axes.axvline(x, color="#8a8a8a", linestyle=":", linewidth=1, label=label)
    scale = "log" if panel.xscale == "log" else "linear"
    axes.set(title=panel.title, xlabel=panel.xlabel, xscale=scale)
    axes.grid(True)
    if panel.xscale == "share":
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    elif scale == "log":
        # The default labels, powers of ten, are math text, which figures.mplstyle turns off.
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
        longest = max((curve.xs[-1] for curve in panel.curves if len(curve.xs)), default=1)
        axes.set_xlim(1 - 0.03 * longest, max(longest * 1.03, 1.5))
        values = np.array([y for curve in panel.curves for y in curve.ys], dtype=float)
        usual = np.nanquantile(values, USUAL) if np.isfinite(values).any() else 0.0
        if np.nanmax(values, initial=0.0) > CUT_OFF * usual > 0:  # one epoch shot up
            axes.set_ylim(top=2 * usual)
            axes.set_title(f"{panel.title}, cut off: up to {np.nanmax(values):.3g}")
    if len(panel.curves) > 1 or panel.marks:
        axes.legend()


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> "Figure":
    """Draws a confusion matrix, with a row per true class.

    Each column is a predicted class. The colour of a cell shows the fraction of the row's images in
    the cell. With at most 20 classes, a cell that is not zero contains its number. With at most 120
    classes, the axes show the class names.

    Args:
        matrix: the number of images per cell, integers of shape (classes, classes).
        classes: the names of the classes, in the order of the rows and columns.
        title: the text above the matrix.
    """
    from matplotlib.figure import Figure

    number = len(classes)
    if number <= MAX_CLASSES_WITH_NUMBERS:
        side = max(3.6, 0.42 * number)  # inches
        axes = Figure(figsize=(side + 0.8, side + 0.5), layout="constrained").add_subplot()
    else:  # fixed margins, since the constrained layout takes seconds for 200 names
        side, margin = min(max(3.6, 0.17 * number), 20.0), 2.0
        figure = Figure(figsize=(side + margin, side + margin))
        left = margin / (side + margin)
        axes = figure.add_axes((left, left, 0.98 - left, 0.96 - left))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cells = np.zeros((number, number, 4))
    cells[..., :3] = [int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    cells[..., 3] = 0.8 * np.sqrt(share)  # the root makes rare mistakes visible
    axes.imshow(cells, interpolation="nearest")
    if number <= MAX_CLASSES_WITH_NUMBERS:
        for row, column in np.argwhere(matrix):
            count = f"{matrix[row, column]}"
            axes.text(column, row, count, ha="center", va="center", fontsize=8)
    if number <= MAX_CLASSES_WITH_NAMES:
        names = [shorten_name(name) for name in classes]
        size = 9 if number <= 40 else 7
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="labelled", title=title)
    return axes.figure


def draw_images(images: Sequence[np.ndarray], labels: Sequence[str]) -> "Figure":
    """Draws images in rows of eight, with a text above each image.

    Args:
        images: the pixels of each image, uint8 (height, width, channels), with 1 or 3 channels.
        labels: the text above each image.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // IMAGES_PER_ROW)
    figure = Figure(figsize=(IMAGES_PER_ROW * 1.1, rows * 1.3), layout="constrained")
    for axes in figure.subplots(rows, IMAGES_PER_ROW, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, label in zip(figure.axes, images, labels, strict=False):  # some stay empty
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(shorten_name(label), fontsize=8)
    return figure
