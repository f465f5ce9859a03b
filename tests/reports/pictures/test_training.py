from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.reports.pictures.training import TrainingRun, draw_training, smooth, training_run
from tests.reports.pictures.made_up import runs_of, write_run


def slow_smooth(x: np.ndarray, values: np.ndarray, share: float) -> np.ndarray:
    smoothed = np.full_like(values, np.nan)
    for place in range(len(x)):
        weights = [np.exp(-abs(x[place] - other) / (share * (x[-1] - x[0]))) for other in x]
        known = [(weight, value) for weight, value in zip(weights, values, strict=True) if np.isfinite(value)]
        if np.isfinite(values[place]):
            smoothed[place] = sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)
    return smoothed


def test_smoothing_is_an_average_to_both_sides() -> None:
    rng = np.random.default_rng(3)
    x, values = rng.uniform(0.5, 1.5, size=23).cumsum(), rng.normal(size=23)
    values[[0, 7, 8]] = np.nan
    for share in (0.02, 0.3, 1.0):
        assert smooth(x, values, share) == pytest.approx(slow_smooth(x, values, share), nan_ok=True)
    assert smooth(x, values, 0.0) is values
    # A straight line stays where it is in the middle: nothing lags behind.
    line = smooth(np.arange(101.0), np.arange(101.0), 0.02)
    assert line[50] == pytest.approx(50.0)
    assert smooth(np.array([4.0]), np.array([2.0]), 0.5).tolist() == [2.0]
    assert np.isnan(smooth(x, np.full(23, np.nan), 0.5)).all()


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    (found,) = runs_of(write_run(tmp_path / "a"))
    return training_run("a", found.steps, found.evaluations, "hours", 3)


def test_hours_are_those_of_the_steps(run: TrainingRun) -> None:
    # Two records of two steps of 2 s, then three of 4 s, on three ranks.
    assert run.x * 3600 / 3 == pytest.approx([4.0, 8.0, 16.0, 24.0, 32.0])
    assert (run.hours, run.memory_gib, run.pairs_per_second) == (pytest.approx(32.0 * 3 / 3600), 0.5 + 5 / 8, 30.0)
    assert run.held_out_x * 3600 / 3 == pytest.approx([0.0, 32.0])
    assert np.isnan(run.y["rewards/accuracies"]).tolist() == [False, True, False, False, False]


def test_what_is_drawn(tmp_path: Path, run: TrainingRun) -> None:
    others = runs_of(write_run(tmp_path / "b"), write_run(tmp_path / "c"))
    runs = [run, *(training_run(other.label, other.steps, other.evaluations, "hours", 1) for other in others)]
    figure = draw_training(runs, "hours", 0.2)
    curves, costs = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in curves] == ["loss", "reward margin", "win rate of chosen"]
    assert {axes.get_xlabel() for axes in curves} == {"hours of training"}
    for axes in curves:
        # Of each run the records, pale, the curve and the marks.
        assert len(axes.lines) == 9
        raw, curve, marks = axes.lines[:3]
        assert (raw.get_alpha() or 1.0) < 0.5
        assert curve.get_ydata() == pytest.approx(smooth(run.x, np.asarray(raw.get_ydata()), 0.2), nan_ok=True)
        assert marks.get_linestyle() == "None"
        assert len({str(line._dash_pattern) for line in axes.lines[1::3]}) == 3
        assert len({line.get_marker() for line in axes.lines[2::3]}) == 3
    assert [axes.get_title() for axes in costs] == [
        *("minutes of training", "pairs per second, median", "peak memory of the first rank, GiB")
    ]
    assert [bar.get_width() for bar in costs[0].patches] == pytest.approx([1.6, 32 / 60, 32 / 60])
    assert len({bar.get_hatch() for bar in costs[0].patches}) == 3
    assert [label.get_text() for label in costs[0].get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in costs[1].texts] == ["30", "30", "30"]
