"""How every picture looks, and how it is written: colours that colour-blind people tell apart, and nothing told by colour alone.

A line has a dash pattern and a marker of its own and a bar a hatch, so that a picture printed in grey says the same. Drawing goes
through matplotlib's objects; nothing of it outlives a picture, and a reader's own settings of matplotlib change none. The same
records give the same bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from megatron_rmipo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The cycles have no common length: a line shares its colour, its dashes or its marker with another one, never all of them.
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# Straight lines: an SVG of dots is ten times as large.
HATCHES = ("", "///", "--", "xx", "||", "++")
REFERENCE_COLOR = "#7f7f7f"
# Of what stands behind: records before they are smoothed, an evaluation before training, pairs behind their means.
PALE = 0.35
# How much of its colour a bar has.
_LIGHT = 0.55
# A longer name of a run loses its middle.
_LONGEST_LABEL = 34
_INCHES_PER_LETTER = 0.075
_SETTINGS = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.6,
    # Text stays text, and ids of an SVG do not change from call to call.
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_rmipo",
    "pdf.fonttype": 42,
    "savefig.dpi": 150.0,
}
# Without the time at which it was written.
_METADATA = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _matplotlib() -> Any:
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError(
            "pictures are drawn by the package matplotlib, which is missing. Install it with pip install "
            "'megatron-rmipo[plots]', or do without the picture."
        ) from error
    return matplotlib


def styled(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """A function that draws or writes, in the style of all pictures; it raises ConfigError where matplotlib is missing."""

    @functools.wraps(function)
    def in_style(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        matplotlib = _matplotlib()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_SETTINGS)
            return function(*args, **kwargs)

    return in_style


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its panels, to be called from a :func:`styled` function.

    Args:
        rows, columns: of panels.
        size: (width, height) in inches, of all.
        options: of matplotlib's ``subplots``, such as ``sharey``.

    Returns:
        The figure; its axes, an array ``[rows, columns]``.
    """
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line of this number, from 0."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def marker_style(number: int) -> dict[str, Any]:
    """Colour and marker of the points of this number, without a line."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of the bars of this number; the colour is light, so that hatch, error and label are seen on it."""
    color = COLORS[number % len(COLORS)]
    # Mixed with white here: a transparent colour behind a hatch is an opaque one in an SVG, and hides it.
    light = "#" + "".join(f"{round(255 - _LIGHT * (255 - int(color[at : at + 2], 16))):02X}" for at in (1, 3, 5))
    return {"facecolor": light, "edgecolor": color, "hatch": HATCHES[number % len(HATCHES)], "linewidth": 0.8}


def short_label(label: str) -> str:
    """A name that fits beside a picture."""
    if len(label) <= _LONGEST_LABEL:
        return label
    half = (_LONGEST_LABEL - 3) // 2
    return f"{label[:half]}...{label[-half:]}"


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend for all panels, below them, where it hides nothing; as many columns as the figure's width holds."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / ((longest + 9) * _INCHES_PER_LETTER))))
    # Rows of even length rather than one that is almost empty.
    columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure; the directory is made.

    Args:
        figure: of one of the draw functions.
        path: the file; its extension says the format, vectors (svg, pdf) or pixels (png).

    Raises:
        ConfigError: it cannot be written, or matplotlib knows no such format.
    """
    form = path.suffix.lstrip(".").lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=_METADATA.get(form))
    except (OSError, ValueError) as error:
        raise ConfigError(f"picture {path}: cannot be written: {error}. Formats are {', '.join(FORMATS)}.") from error
