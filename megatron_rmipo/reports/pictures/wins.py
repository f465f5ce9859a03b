"""How often one response or model wins, as bars: the paper's Figure 5."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_rmipo.reports.pictures.style import REFERENCE_COLOR, bar_style, legend_below, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a normal distribution, 95 % lie within so many standard deviations.
DEVIATIONS = 1.959964


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often something won.

    Attributes:
        label: whose wins, a row of the picture.
        category: of what they were counted, a bar of the row.
        wins, ties: shares of 0 to 1.
        interval: (low, high) of the rate, at 95 %; None where it is not known.
        num_pairs: on how many comparisons they stand; None where that is not known.
        before: the rate before training; None where that is not known.
    """

    label: str
    category: str
    wins: float
    ties: float
    interval: tuple[float, float] | None = None
    num_pairs: int | None = None
    before: float | None = None

    @property
    def rate(self) -> float:
        """The win rate: a tie is half of a win."""
        return self.wins + self.ties / 2.0


def count_wins(label: str, category: str, gaps: Sequence[float], first: Sequence[float] = ()) -> WinRate:
    """How often the chosen response is the more likely one.

    Args:
        label, category: of the result.
        gaps: of each pair, chosen less rejected; a tie is 0. At least one.
        first: the same before training; may be empty.
    """
    total = len(gaps)
    wins, ties = _wins_and_ties(gaps)
    wins_before, ties_before = _wins_and_ties(first)
    before = (wins_before + ties_before / 2.0) / len(first) if len(first) else None
    return WinRate(label, category, wins / total, ties / total, wilson_interval(wins + ties / 2.0, total), total, before)


def _wins_and_ties(gaps: Sequence[float]) -> tuple[int, int]:
    return sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps)


def wilson_interval(wins: float, total: int) -> tuple[float, float]:
    """The share of wins at 95 %, within 0 and 1 also where nothing or everything was won.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    squared = DEVIATIONS**2
    middle = (wins + squared / 2.0) / (total + squared)
    half = DEVIATIONS / (total + squared) * math.sqrt(wins * (total - wins) / total + squared / 4.0)
    return max(0.0, middle - half), min(1.0, middle + half)


@styled
def draw_wins(rates: Sequence[WinRate], title: str) -> Figure:
    """Bars of wins, ties behind them, with the interval of the rate; a diamond where the rate was before training.

    Args:
        rates: at least one; a label has each category once at most.
        title: says who won against whom.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels = list(dict.fromkeys(rate.label for rate in rates))
    categories = list(dict.fromkeys(rate.category for rate in rates))
    height = 0.8 / len(categories)
    figure, panels = new_figure(1, 1, (7.0, 1.5 + max(0.42, 0.27 * len(categories)) * len(labels)))
    axes = panels[0][0]
    for rate in rates:
        number = categories.index(rate.category)
        place = labels.index(rate.label) + (number - (len(categories) - 1) / 2) * height
        _draw_bar(axes, rate, place, 0.92 * height, number)
    axes.axvline(50.0, color=REFERENCE_COLOR, linewidth=0.8, linestyle="--", zorder=2.5)
    axes.set(title=title, xlabel="wins, %", xlim=(0.0, 100.0))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first one on top
    axes.grid(visible=False, axis="y")
    handles: list[Any] = [
        Patch(label=category, **bar_style(number)) for number, category in enumerate(categories) if len(categories) > 1
    ]
    if any(rate.ties for rate in rates):
        handles.append(Patch(label="ties, half of a win each", **_TIES))
    if any(rate.before is not None for rate in rates):
        handles.append(Line2D([], [], label="before training", **_BEFORE))
    if any(rate.interval is not None for rate in rates):
        handles.append(Line2D([], [], color="black", linewidth=1.0, label="95 % interval"))
    legend_below(figure, handles)
    return figure


_TIES: dict[str, Any] = {"facecolor": "#dddddd", "edgecolor": REFERENCE_COLOR, "linewidth": 0.5}
_BEFORE: dict[str, Any] = {
    **{
        "color": "black",
        "marker": "D",
        "markerfacecolor": "white",
        "markersize": 4.5,
        "linestyle": "none",
        "zorder": 4,
        "clip_on": False,
    }
}


def _draw_bar(axes: Any, rate: WinRate, place: float, height: float, number: int) -> None:
    axes.barh(place, 100.0 * rate.wins, height, **bar_style(number))
    if rate.ties:
        axes.barh(place, 100.0 * rate.ties, height, left=100.0 * rate.wins, **_TIES)
    if rate.before is not None:
        axes.plot([100.0 * rate.before], [place], **_BEFORE)
    if rate.interval is not None:
        low, high = rate.interval
        beyond = [[100.0 * max(0.0, rate.rate - low)], [100.0 * max(0.0, high - rate.rate)]]
        axes.errorbar([100.0 * rate.rate], [place], xerr=beyond, color="black", elinewidth=1.0, capsize=2.0, zorder=3)
    text = f"{100.0 * rate.rate:.1f}" + ("" if rate.num_pairs is None else f"  (n = {rate.num_pairs})")
    # Beside the panel, where no interval is.
    axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
