"""Curves of a page: few points, none of them lost that matters; where their ticks are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_rmipo.reports.page.curves import build_charts, running_mean, thinned
from megatron_rmipo.reports.page.numbers import duration, short_number, tick_values
from megatron_rmipo.reports.page.run_files import read_page_run
from megatron_rmipo.reports.page.svg import chart_data, draw_chart
from tests.reports.page.runs import write_page_run


def test_a_spike_of_a_long_curve_stays() -> None:
    points = [(float(step), math.sin(step / 900.0)) for step in range(20_011)]
    points[7_777] = (7_777.0, 55.0)
    points[15_001] = (15_001.0, -55.0)
    kept = thinned(points, 300)
    assert len(kept) <= 300
    assert {points[7_777], points[15_001], points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:300], 300) == points[:300]


def test_the_running_mean_begins_without_a_bias() -> None:
    assert running_mean([(float(step), 3.0) for step in range(100)]) == [(float(step), pytest.approx(3.0)) for step in range(100)]
    jump = running_mean([(float(step), float(step >= 50)) for step in range(100)])
    assert jump[49][1] == 0.0
    assert 0.2 < jump[50][1] < 0.4
    assert jump[-1][1] > 0.99


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]), (-0.31, 0.42, [-0.2, 0.0, 0.2, 0.4]), (3.0, 3.0, [3.0]), (1e-7, 6e-7, None)],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float] | None) -> None:
    found = tick_values(low, high)
    assert found == pytest.approx(ticks if ticks is not None else [2e-7, 4e-7, 6e-7])


def test_numbers_are_short() -> None:
    assert [*map(short_number, (0.0, 1234567.0, 1234.5, 0.123456, 6e-7, float("nan"), None))] == [
        *("0", "1.23e+06", "1,234", "0.1235", "6e-07", "nan", "\u2013"),
    ]
    assert [*map(duration, (7.4, 95.0, 7_500.0))] == ["7 s", "1 min 35 s", "2 h 05 min"]


def test_charts_are_of_what_the_runs_have(tmp_path: Path) -> None:
    runs = [
        read_page_run(write_page_run(tmp_path / "first")),
        read_page_run(write_page_run(tmp_path / "second", flags=["--objective", "dpo"], **{"pipeline_bubble": 0.25})),
    ]
    charts = {chart.key: chart for chart in build_charts(runs)}
    assert set(charts) == {
        *("loss", "accuracy", "margin", "gamma", "logps", "grad-norm", "lr", "pairs-per-second", "memory", "phases", "bubble"),
    }
    assert charts["gamma"].levels == [(0.3, "gamma_min"), (1.6, "gamma_max")]
    # A colour a run, and a pattern a number within it: neither says it alone.
    looks = [(series.color, series.dash, series.marked) for series in charts["logps"].series if not series.faint]
    assert len(set(looks)) == len(looks) == 8
    drawn = draw_chart(charts["bubble"])
    assert "0.2" in drawn
    assert chart_data(charts["bubble"])["series"][0]["points"][-1] == [30.0, 0.25]


def test_a_constant_and_a_single_point_can_be_drawn(tmp_path: Path) -> None:
    run = read_page_run(write_page_run(tmp_path / "run", steps=2, loss=0.0, grad_norm=0.0))
    for chart in build_charts([run]):
        assert "nan" not in draw_chart(chart)
