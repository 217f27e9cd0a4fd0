"""Figures, by matplotlib's figure API: no window, no global state; text in SVG stays text.

An SVG takes its ink from the page around it (`currentColor`), so that it is at home in light and
dark; a PNG is dark on white.
"""

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cnn.utils.screen import shorten_name

BLUE, ORANGE, GREEN = "#3b82d6", "#e07b2a", "#3a9e6b"  # legible on white and on near-black
COLOURS = (BLUE, ORANGE, GREEN, "#b05cc7", "#c9485b", "#8a7a3c", "#3aa6b0", "#7d7d7d")
INK, GRID = "#010203", "#040506"  # stand for the page's own colours while an SVG is drawn
MAX_CLASSES_WITH_NUMBERS, MAX_CLASSES_WITH_NAMES = 20, 120

# For the PNGs, whose text is drawn here: the first of these that is installed comes after DejaVu.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "SimHei"),
    *("Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Noto Sans CJK JP"),
)


def is_available() -> bool:
    """Whether matplotlib is installed; asks without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Curve:
    label: str | None  # None: not in the legend
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = BLUE
    dashed: bool = False


@contextlib.contextmanager
def _style(ink: str, grid: str) -> Iterator[None]:
    import matplotlib
    from matplotlib import font_manager

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    installed = set(font_manager.fontManager.get_font_names())
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same figure has the same bytes
        "font.family": ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]],
        "font.size": 9,
        "text.parse_math": False,  # a class may be called $x$
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink
        ),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has it
        yield


# -- figures: functions of what they show, drawn within a style -----------------------------------


def _axes(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_curves(
    axes, title: str, curves: Sequence[Curve], marks: Sequence[float] = (), **scale: str
) -> None:
    """Lines over epochs, a dot where there is one point only; dotted where the run was resumed."""
    for curve in curves:
        single = sum(y is not None and np.isfinite(y) for y in curve.ys) <= 1
        axes.plot(
            curve.xs,
            [np.nan if y is None else y for y in curve.ys],
            "--" if curve.dashed else "-",
            color=curve.colour,
            linewidth=1.6,
            marker="o" if single else None,
            markersize=4,
            label=re.sub("^_", " _", curve.label or ""),  # those with _ first are left out
            gid=f"{title} {curve.label}".replace(" ", "-"),
        )
    for number, x in enumerate(marks):
        label = scale.get("mark", "resumed") if number == 0 else None
        axes.axvline(x, color="#8a8a8a", linestyle=":", linewidth=1, label=label)
    axes.set_title(title)
    axes.grid(True)
    axes.set_xlabel(scale.get("xlabel", "epoch"))
    if "xscale" in scale:
        axes.set_xscale(scale["xscale"])
        axes.xaxis.set_major_formatter("{x:g}")  # powers are math, which is not parsed
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
        longest = max((curve.xs[-1] for curve in curves if len(curve.xs)), default=1)
        axes.set_xlim(1 - 0.03 * longest, max(longest * 1.03, 1.5))
    if len(curves) > 1 or marks:
        axes.legend(fontsize=8)


def draw_confusion(axes, matrix: np.ndarray, classes: Sequence[str], ink: str) -> None:
    """A row a class as labelled; the tint is the share of the row, the figures are counts."""
    number = len(classes)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cells = np.zeros((number, number, 4))
    cells[..., :3] = [int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    cells[..., 3] = 0.8 * np.sqrt(share)  # roots, so that rare mistakes are seen
    axes.imshow(cells, interpolation="nearest")
    if number <= MAX_CLASSES_WITH_NUMBERS:
        for row, column in zip(*np.nonzero(matrix)):
            text = f"{matrix[row, column]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    if number <= MAX_CLASSES_WITH_NAMES:
        names = [shorten_name(name) for name in classes]
        size = 9 if number <= 40 else 7
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")


def _confusion_axes(number: int):
    """A figure for so many classes, in inches."""
    from matplotlib.figure import Figure

    if number <= MAX_CLASSES_WITH_NUMBERS:
        side = max(3.6, 0.42 * number)
        return _axes(side + 0.8, side + 0.5)
    # Margins by hand: to have 200 names measured again and again takes seconds.
    side, margin = min(max(3.6, 0.17 * number), 20.0), 2.0
    figure = Figure(figsize=(side + margin, side + margin))
    share = margin / (side + margin)
    return figure, figure.add_axes((share, share, 0.98 - share, 0.96 - share))


# -- as SVG for a page, as PNG for a slide ---------------------------------------------------------


def curves_svg(title: str, curves: Sequence[Curve], marks: Sequence[float] = (), **scale) -> str:
    with _style(INK, GRID):
        figure, axes = _axes(4.8, 3.0)
        draw_curves(axes, title, curves, marks, **scale)
        return _svg(figure)


def confusion_svg(matrix: np.ndarray, classes: Sequence[str]) -> str:
    with _style(INK, GRID):
        figure, axes = _confusion_axes(len(classes))
        draw_confusion(axes, matrix, classes, INK)
        return _svg(figure)


def curves_png(
    panels: Sequence[tuple[str, Sequence[Curve]]], marks: Sequence[float] = (), **scale: str
) -> bytes:
    """The panels side by side in one picture."""
    from matplotlib.figure import Figure

    with _style("#222222", "#dddddd"):
        size = (4.4 * len(panels), 3.2) if len(panels) > 1 else (6.4, 4.0)  # inches
        figure = Figure(figsize=size, layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            draw_curves(axes, title, curves, marks, **scale)
        return _png(figure)


def confusion_png(matrix: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    with _style("#222222", "#dddddd"):
        figure, axes = _confusion_axes(len(classes))
        draw_confusion(axes, matrix, classes, "#222222")
        axes.set_title(title)
        return _png(figure)


def grid_png(images: Sequence[np.ndarray], labels: Sequence[str]) -> bytes:
    """Images, uint8 (H, W, C), eight in a row, each under its label."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // 8)
    with _style("#222222", "#dddddd"):
        figure = Figure(figsize=(8 * 1.1, rows * 1.3), layout="constrained")
        for axes in figure.subplots(rows, 8, squeeze=False).flat:
            axes.set_axis_off()
        for axes, image, label in zip(figure.axes, images, labels):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_title(shorten_name(label), fontsize=8)
        return _png(figure)


def _svg(figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return "\n".join(line.strip() for line in text.splitlines())


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()
