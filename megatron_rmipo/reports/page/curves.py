"""Which curves a report shows, and the points they are drawn by: few enough for a page, however long the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.page.run_files import Column, PageRun
from megatron_rmipo.reports.timers import PHASES

Point = tuple[float, float]
# So many points a curve at most, fewer where many curves share a picture.
_MOST_POINTS, _MOST_OF_ALL = 300, 1500
# From so many steps on a noisy number is shown with its running mean.
_SMOOTHED_FROM = 24


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        label: in the legend.
        color: number of its colour.
        dash: number of its pattern: 0 solid, 1 dashed, 2 dotted, 3 dash-dot, 4 long dashes.
        points: by step.
        band: (step, low, high) of what is filled behind it.
        marked: each point has a mark.
        faint: a thin line in the background, of what another series is the running mean of; not in the legend.
    """

    label: str
    color: int
    points: Sequence[Point]
    dash: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    marked: bool = False
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Attributes:
        key: its anchor.
        title: what is drawn, with its unit.
        note: how to read it.
        series: the curves.
        levels: (value, label) of horizontal lines.
        low: the axis begins there at the latest; None: where the values do.
    """

    key: str
    title: str
    note: str
    series: Sequence[Series]
    levels: Sequence[tuple[float, str]] = ()
    low: float | None = None


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a chart is made of: names of training records and of evaluations, each with what it is called beside others."""

    key: str
    title: str
    note: str = ""
    names: Sequence[tuple[str, str]] = ()
    evaluated: bool = False
    band: bool = False
    low: float | None = None
    levels: Callable[[PageRun], list[tuple[float, str]]] = lambda run: []


def _gamma_bounds(run: PageRun) -> list[tuple[float, str]]:
    bounds = [(run.config.get(name), name) for name in ("gamma_min", "gamma_max")]
    return [(float(value), name) for value, name in bounds if value is not None]


def _clip(run: PageRun) -> list[tuple[float, str]]:
    limit = run.config.get("clip_grad")
    return [(float(limit), "clip_grad")] if limit else []


_WANTED = (
    _Wanted("loss", "Loss", "of the objective", [("loss", "")], evaluated=True),
    _Wanted(
        *("accuracy", "Preference accuracy", "share of pairs whose chosen response has the higher reward"),
        [("rewards/accuracies", "")],
        evaluated=True,
        levels=lambda run: [(0.5, "chance")],
    ),
    _Wanted("margin", "Reward margin", "chosen less rejected, by the objective's own reward", [("rewards/margins", "")], True),
    _Wanted(
        *("gamma", "Target margin gamma", "mean; the band holds nine of ten pairs (5 % to 95 %)"),
        [("gamma", "")],
        evaluated=True,
        band=True,
        levels=_gamma_bounds,
    ),
    _Wanted(
        *("logps", "Log-probability per token", "in nats; both may fall while the margin grows"),
        [("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
        evaluated=True,
    ),
    _Wanted("grad-norm", "Gradient norm", "before clipping", [("grad_norm", "")], low=0.0, levels=_clip),
    _Wanted("lr", "Learning rate", "", [("lr", "")], low=0.0),
    _Wanted("pairs-per-second", "Pairs per second", "over all ranks", [("pairs_per_second", "")], low=0.0),
    _Wanted("memory", "Peak memory, GiB", "of the first rank", [("memory_gib", "")], low=0.0),
    _Wanted(
        *("phases", "Seconds of a step by phase", "as the first rank's host sees them"),
        [(f"seconds/{phase}", phase) for phase in (*PHASES, "other")],
        low=0.0,
    ),
    _Wanted(
        *("bubble", "Pipeline bubble", "share of a step that stages stand still, by the cost of packs"),
        [("pipeline_bubble", "")],
        low=0.0,
    ),
    _Wanted("straggler", "Straggler", "share of a step by which the slowest rank is behind", [("straggler_share", "")], low=0.0),
    _Wanted("expert-imbalance", "Imbalance of experts", "the busiest one's load over the mean", [("experts/imbalance", "")]),
)


def build_charts(runs: Sequence[PageRun]) -> list[Chart]:
    """The charts that any of the runs has values for."""
    charts = [_chart(wanted, runs) for wanted in _WANTED]
    return [chart for chart in charts if any(len(series.points) > 1 for series in chart.series)]


def _chart(wanted: _Wanted, runs: Sequence[PageRun]) -> Chart:
    count = len(runs) * len(wanted.names) * (2 if wanted.evaluated else 1)
    limit = max(40, min(_MOST_POINTS, _MOST_OF_ALL // max(count, 1)))
    series: list[Series] = []
    for number, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for place, (name, called) in enumerate(wanted.names):
            # One run has a colour for each number, several have one each and the numbers a pattern.
            color, dash = (number, place) if len(runs) > 1 else (place if len(wanted.names) > 1 else 0, 0)
            trained = _trained(run.columns.get(name), f"{prefix}{called}", color, dash, limit, alone=not wanted.evaluated)
            series += trained
            if wanted.evaluated:
                own = color if len(runs) > 1 or len(wanted.names) > 1 else 1
                series += _evaluated(run, name, wanted, f"{prefix}{called}", own, dash, limit)
    levels = dict.fromkeys(level for run in runs for level in wanted.levels(run))
    return Chart(wanted.key, wanted.title, wanted.note, series, list(levels), wanted.low)


def _trained(column: Column | None, label: str, color: int, dash: int, limit: int, *, alone: bool) -> list[Series]:
    """The values of training steps; with their running mean where they are many and noisy."""
    if column is None:
        return []
    points = list(zip(column.steps, column.values, strict=True))
    label = label.removesuffix(": ") if alone else f"{label} training".replace(":  ", ": ").strip()
    if alone or len(points) < _SMOOTHED_FROM:
        return [Series(label, color, thinned(points, limit), dash)]
    return [
        Series("", color, thinned(points, limit), dash, faint=True),
        Series(label, color, thinned(running_mean(points), limit), dash),
    ]


def _evaluated(run: PageRun, name: str, wanted: _Wanted, label: str, color: int, dash: int, limit: int) -> list[Series]:
    series = []
    for place, (kind, held_out) in enumerate(run.held_out.items()):
        points = _points(held_out.records, name)
        band: list[tuple[float, float, float]] = []
        if wanted.band and not kind:
            low, high = (dict(_points(held_out.records, f"{name}/{percentile}")) for percentile in ("p5", "p95"))
            band = [(step, low[step], high[step]) for step, _ in points if step in low and step in high]
        text = f"{label} held out{f' ({kind})' if kind else ''}".replace(":  ", ": ").strip()
        if points:
            series.append(Series(text, color, thinned(points, limit), min(3, dash + 1 + place), band, marked=True))
    return series


def _points(records: Iterable[Record], name: str) -> list[Point]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about a thirtieth of the points, begun without a bias."""
    keep = 1.0 - 1.0 / max(3.0, len(points) / 30.0)
    mean, weight = 0.0, 0.0
    found = []
    for step, value in points:
        mean, weight = keep * mean + (1.0 - keep) * value, keep * weight + (1.0 - keep)
        found.append((step, mean / weight))
    return found


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most so many points: of each of equal parts the lowest and the highest, so that a spike stays; first and last stay."""
    if len(points) <= limit:
        return list(points)
    parts = max(1, (limit - 2) // 2)
    kept = {0, len(points) - 1}
    for number in range(parts):
        part = range(number * len(points) // parts, (number + 1) * len(points) // parts)
        kept |= {min(part, key=lambda at: points[at][1]), max(part, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]
