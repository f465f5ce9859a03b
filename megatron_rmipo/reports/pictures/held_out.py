"""What one evaluation says of its held-out pairs, for trackers: how margins and gaps in log-probability are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_rmipo.reports.pictures.gaps import GAP_AXIS
from megatron_rmipo.reports.pictures.style import REFERENCE_COLOR, bar_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Columns = Mapping[str, npt.NDArray[np.float32]]

# Bars rather than a density: counted in one pass, however many pairs there are.
_BINS = 30


@styled
def draw_held_out(title: str, values: Columns) -> Figure | None:
    """A panel for each of the reward margin, the target margin and the gap in log-probability per token that there are.

    Args:
        title: above the panels.
        values: name -> ``[P]``, a number per pair.

    Returns:
        None where the pairs have none of these, or none that is finite.

    Raises:
        ConfigError: matplotlib is missing.
    """
    shown = {name: known for name, column in _columns(values).items() if (known := column[np.isfinite(column)]).size}
    if not shown:
        return None
    figure, panels = new_figure(1, len(shown), (4.0 * len(shown), 3.2))
    figure.suptitle(title)
    for axes, (name, column) in zip(panels[0], shown.items(), strict=True):
        axes.hist(column, bins=_BINS, **bar_style(0))
        axes.axvline(float(np.median(column)), color="black")
        axes.axvline(0.0, color=REFERENCE_COLOR, linewidth=0.8)
        axes.set(xlabel=name, ylabel="pairs", title=f"median {np.median(column):.3f}, n = {column.size}")
    return figure


def _columns(values: Columns) -> dict[str, npt.NDArray[np.float32]]:
    """What is drawn, by what a reader calls it."""
    titles = {"rewards/margins": "reward margin", "gamma": "target margin gamma"}
    found = {title: np.asarray(values[name]) for name, title in titles.items() if name in values}
    if "logps/chosen" in values and "logps/rejected" in values:
        found[GAP_AXIS] = np.asarray(values["logps/chosen"]) - np.asarray(values["logps/rejected"])
    return found
