"""Charts as SVG: text stays text, and colours are the page's own, so that they follow its light and dark."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_rmipo.reports.page.curves import Chart, Series
from megatron_rmipo.reports.page.numbers import short_number, tick_values

WIDTH, HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "14 4")
NUM_COLORS = 8


@dataclasses.dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1.0) * (HEIGHT - _TOP - _BOTTOM)


def draw_chart(chart: Chart) -> str:
    """The SVG element of a chart that has points."""
    frame = _frame(chart)
    parts = [*_axes(frame), *_levels(chart.levels, frame)]
    for series in sorted(chart.series, key=lambda one: not one.faint):
        parts += _series(series, frame)
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" x1="0" x2="0" hidden=""/>')
    label = html.escape(f"{chart.title} by step", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def chart_data(chart: Chart) -> dict[str, Any]:
    """What shows the values under the pointer: where steps lie in the picture, and the points of each curve."""
    frame = _frame(chart)
    shown = [series for series in chart.series if not series.faint]
    return {
        "x": [frame.x_low, frame.x_high, _LEFT, WIDTH - _RIGHT, WIDTH],
        "series": [{"label": one.label, "points": [[x, float(f"{y:.5g}")] for x, y in one.points]} for one in shown],
    }


def legend_line(series: Series) -> str:
    """A short piece of the curve, for the legend."""
    mark = f'<circle class="c{series.color % NUM_COLORS}" cx="14" cy="6" r="3"/>' if series.marked else ""
    return f'<svg class="key" viewBox="0 0 28 12" aria-hidden="true"><path {_stroke(series)} d="M1 6H27"/>{mark}</svg>'


def _frame(chart: Chart) -> _Frame:
    steps = [x for series in chart.series for x, _ in series.points]
    values = [y for series in chart.series for _, y in series.points]
    values += [bound for series in chart.series for _, low, high in series.band for bound in (low, high)]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    # A level far from the curves would press them flat.
    values += [level for level, _ in chart.levels if low - span <= level <= high + span]
    low, high = min(values), max(values)
    if chart.low is not None:
        low = min(low, chart.low)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return _Frame(min(steps), max(steps), low if low == chart.low else low - margin, high + margin)


def _axes(frame: _Frame) -> Iterable[str]:
    for value in tick_values(frame.y_low, frame.y_high):
        y = f"{frame.y(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick end" x="{_LEFT - 6}" y="{y}" dy=".35em">{short_number(_clean(value))}</text>'
    for value in tick_values(frame.x_low, frame.x_high, 5):
        if value == int(value):
            yield f'<text class="tick mid" x="{frame.x(value):.1f}" y="{HEIGHT - 8}">{int(value):,}</text>'


def _clean(value: float) -> float:
    """Without the dust of a sum of steps."""
    return float(f"{value:.6g}") if abs(value) > 1e-12 else 0.0


def _levels(levels: Sequence[tuple[float, str]], frame: _Frame) -> Iterable[str]:
    for value, label in levels:
        if frame.y_low <= value <= frame.y_high:
            y = frame.y(value)
            yield f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            # Under its line where there is no place above.
            place = y - 4 if y - 14 > _TOP else y + 13
            yield f'<text class="tick end" x="{WIDTH - _RIGHT}" y="{place:.1f}">{html.escape(label)}</text>'


def _series(series: Series, frame: _Frame) -> Iterable[str]:
    color = f"c{series.color % NUM_COLORS}"
    if series.band:
        upper = [(x, high) for x, _, high in series.band]
        lower = [(x, low) for x, low, _ in reversed(series.band)]
        yield f'<path class="band {color}" d="{_path([*upper, *lower], frame)}Z"/>'
    if series.points:
        yield f'<path {_stroke(series)} d="{_path(series.points, frame)}"/>'
    # Marks that touch each other say no more than the line.
    if series.marked and len(series.points) <= 60:
        for x, y in series.points:
            yield f'<circle class="{color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'


def _stroke(series: Series) -> str:
    dash = _DASHES[series.dash % len(_DASHES)]
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return f'class="line c{series.color % NUM_COLORS}{" faint" if series.faint else ""}"{pattern}'


def _path(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points]
    return "M" + "L".join(places)


def draw_histogram(counts: Sequence[int], step: int, label: str) -> str:
    """Bars of how many have how many tokens, ``step`` tokens each, as an SVG element."""
    width, height, foot = 260, 84, 18
    most, bar = max(counts), width / len(counts)
    bars = "".join(
        f'<rect class="bar" x="{number * bar + 0.5:.1f}" y="{height - foot - count / most * (height - foot - 2):.1f}" '
        f'width="{max(bar - 1, 0.5):.1f}" height="{count / most * (height - foot - 2):.1f}">'
        f"<title>{number * step + 1:,} to {(number + 1) * step:,} tokens: {count:,}</title></rect>"
        for number, count in enumerate(counts)
        if count
    )
    ends = (
        f'<text class="tick" x="0" y="{height - 5}">1</text>'
        f'<text class="tick end" x="{width}" y="{height - 5}">{len(counts) * step:,} tokens</text>'
    )
    name = html.escape(label, quote=True)
    rule = f'<line class="grid" x1="0" x2="{width}" y1="{height - foot}" y2="{height - foot}"/>'
    return f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{bars}{rule}{ends}</svg>'
