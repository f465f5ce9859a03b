"""Reward differences beside the data's own differences in score: the paper's Figure 6.

The paper names no distance between the two densities. Here it is the Wasserstein distance, after each side is divided by its root
mean square: rewards of every objective, and scores, have units of their own, and so divided they keep their sign.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_rmipo.reports.held_out import standard_error
from megatron_rmipo.reports.pictures.densities import Column, draw_density, points_over
from megatron_rmipo.reports.pictures.style import REFERENCE_COLOR, legend_below, line_style, marker_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = 2604
# Of the values; far ones would press the curves together.
_SHOWN = 0.98
# Pairs of more different scores than this are put into so many groups.
_MOST_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class RewardRun:
    """A run's rewards and what the data say of the same pairs.

    Attributes:
        label: what the run is called.
        rewards: of each pair, chosen less rejected, ``[P]``, finite.
        scores: the same of the data's scores, ``[P]``, finite.
    """

    label: str
    rewards: Column
    scores: Column


def jitter(values: Column) -> Column:
    """Discrete values made continuous: each moved, uniformly, by at most half of the least step between two of them.

    The same values are moved by the same amounts.
    """
    steps = np.diff(np.unique(values))
    half = 0.5 * float(steps.min()) if steps.size else 0.0
    return values + np.random.default_rng(_SEED).uniform(-half, half, len(values))


def in_own_units(values: Column) -> Column:
    """Values divided by their root mean square, which keeps their signs; zeros stay zeros."""
    size = float(np.sqrt(np.mean(values**2)))
    return values / size if size > 0.0 else values


def wasserstein_distance(first: Column, second: Column) -> float:
    """By how much the values of one have to be moved on average to be spread as those of the other.

    ``W_1 = integral |F(x) - G(x)| dx`` over the shares F, G of values at most x: exact, whatever the two numbers of values.

    Args:
        first, second: at least one value each.
    """
    every = np.sort(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(values), every[:-1], side="right") / len(values) for values in (first, second)]
    return float(np.sum(np.abs(shares[0] - shares[1]) * np.diff(every)))


def grouped_by(scores: Column, rewards: Column) -> list[tuple[float, float, float]]:
    """The pairs in groups of equal score, or, of many scores, of about equal number.

    Returns:
        (mean score, mean reward, its standard error, 0 where that is not known) of each group, by rising score.
    """
    distinct = np.unique(scores)
    if len(distinct) > _MOST_GROUPS:
        edges = np.unique(np.quantile(scores, np.linspace(0.0, 1.0, _MOST_GROUPS + 1)[1:-1]))
    else:
        edges = distinct[1:]
    group = np.searchsorted(edges, scores, side="right")
    members = [group == number for number in np.unique(group)]
    return [(float(scores[one].mean()), float(rewards[one].mean()), standard_error(rewards[one]) or 0.0) for one in members]


@styled
def draw_rewards(runs: Sequence[RewardRun]) -> Figure:
    """Left the densities, REF that of the scores, with each run's distance to it; right the rewards by score, groups as marks.

    Args:
        runs: at least one, each with at least one pair; REF is drawn of the first run's scores.
    """
    from matplotlib.lines import Line2D

    figure, panels = new_figure(1, 2, (9.0, 4.0))
    densities, groups = panels[0]
    references = [in_own_units(jitter(run.scores)) for run in runs]
    rewards = [in_own_units(run.rewards) for run in runs]
    points = points_over([references[0], *rewards], _SHOWN)
    draw_density(densities, references[0], points, color=REFERENCE_COLOR, linewidth=1.0)
    densities.fill_between(points, densities.lines[0].get_ydata(), color=REFERENCE_COLOR, alpha=0.3, linewidth=0.0)
    handles = [Line2D([], [], color=REFERENCE_COLOR, linewidth=6.0, alpha=0.4, label="REF: the data's scores, jittered")]
    for number, (run, reference, own) in enumerate(zip(runs, references, rewards, strict=True)):
        draw_density(densities, own, points, **line_style(number))
        groups.plot(reference, own, ".", color=line_style(number)["color"], markersize=2.5, alpha=0.25)
        x, y, errors = zip(*grouped_by(in_own_units(run.scores), own), strict=True)
        marks = {**line_style(number), "marker": marker_style(number)["marker"]}
        groups.errorbar(x, y, yerr=errors, **marks, markersize=5, markerfacecolor="white", elinewidth=1.0, zorder=3)
        distance = wasserstein_distance(reference, own)
        handles.append(
            Line2D([], [], label=f"{run.label}: distance {distance:.3f} (n = {len(own)})", **marks, markerfacecolor="white")
        )
    densities.set(title="densities", xlabel="difference, in its root mean square", ylabel="density")
    densities.set_ylim(bottom=0.0)
    densities.axvline(0.0, color=REFERENCE_COLOR, linewidth=0.8, zorder=0.5)
    groups.set(title="reward by score; marks: means of groups", xlabel="difference in score", ylabel="difference in reward")
    groups.axhline(0.0, color=REFERENCE_COLOR, linewidth=0.8, zorder=0.5)
    groups.set_ylim(*np.quantile(np.concatenate(rewards), (0.01, 0.99)) + np.array([-0.5, 0.5]))
    legend_below(figure, handles)
    return figure
