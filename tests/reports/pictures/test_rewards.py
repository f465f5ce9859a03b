"""Reward differences beside scores: the distance against a slow one, and what is drawn."""

from itertools import permutations

import numpy as np
import pytest

from megatron_rmipo.reports.pictures.rewards import (
    RewardRun,
    draw_rewards,
    grouped_by,
    in_own_units,
    jitter,
    wasserstein_distance,
)


def slow_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The least mean way from one to the other: each value as often as makes both equally many, every order tried."""
    first, second = np.repeat(first, len(second)), np.repeat(second, len(first))
    if len(first) > 7:
        # The order that is best is the sorted one; shown for the small ones by the other branch.
        return float(np.abs(np.sort(first) - np.sort(second)).mean())
    return min(float(np.abs(first - np.array(order)).mean()) for order in permutations(second))


@pytest.mark.parametrize(("num_first", "num_second"), [(1, 1), (1, 5), (2, 3), (7, 11), (13, 4)])
def test_the_distance_is_the_least_way_from_one_to_the_other(num_first: int, num_second: int) -> None:
    rng = np.random.default_rng(num_first)
    for _ in range(3):
        # Coarse, so that some values are the same.
        first, second = (rng.normal(size=size).round(1) for size in (num_first, num_second))
        found = wasserstein_distance(first, second)
        assert found == pytest.approx(slow_distance(first, second), abs=1e-12)
        assert found == pytest.approx(wasserstein_distance(second, first), abs=1e-12)
        assert wasserstein_distance(first, first + 0.75) == pytest.approx(0.75)
        assert wasserstein_distance(first, first) == 0.0


def test_jitter_stays_within_half_a_step() -> None:
    values = np.array([3.0, 1.0, 1.5, 3.0, 1.0])
    moved = jitter(values)
    assert np.abs(moved - values).max() <= 0.25
    assert len(np.unique(moved)) == 5
    assert (moved == jitter(values)).all()
    assert (jitter(np.array([2.0, 2.0])) == 2.0).all()


def test_own_units_keep_signs_and_forget_scale() -> None:
    values = np.array([3.0, -4.0, 0.0])
    assert in_own_units(values) == pytest.approx(values / np.sqrt(25.0 / 3.0))
    assert in_own_units(100.0 * values) == pytest.approx(in_own_units(values))
    assert (in_own_units(np.zeros(2)) == 0.0).all()


def test_groups_are_of_equal_score_or_of_equal_number() -> None:
    found = grouped_by(np.array([1.0, 2.0, 1.0, 2.0, 5.0]), np.array([0.0, 1.0, 2.0, 4.0, 7.0]))
    assert np.array(found) == pytest.approx(np.array([(1.0, 1.0, 1.0), (2.0, 2.5, 1.5), (5.0, 7.0, 0.0)]))
    many = grouped_by(np.arange(80.0), np.arange(80.0))
    assert [score for score, _, _ in many] == pytest.approx(4.5 + 10.0 * np.arange(8))


def test_what_is_drawn() -> None:
    scores = np.repeat([0.5, 1.0, 2.0], 9)
    noise = np.random.default_rng(5).normal(scale=0.1, size=27)
    runs = [RewardRun("near", 3.0 * (scores + noise), scores), RewardRun("far", -scores, scores)]
    figure = draw_rewards(runs)
    densities, groups = figure.axes
    reference, near, far = densities.lines[:3]
    distances = [wasserstein_distance(in_own_units(jitter(scores)), in_own_units(run.rewards)) for run in runs]
    # Another scale is no distance, another sign is.
    assert distances[0] < 0.1 < 1.5 < distances[1]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0].startswith("REF")
    assert texts[1:] == [f"{run.label}: distance {distance:.3f} (n = 27)" for run, distance in zip(runs, distances, strict=True)]
    places = np.asarray(reference.get_xdata())
    peaks = [float(places[np.argmax(line.get_ydata())]) for line in (near, far)]
    assert peaks[1] < 0.0 < peaks[0]
    assert len({str(line._dash_pattern) for line in (near, far)}) == 2  # type: ignore[attr-defined]
    # Every pair is a dot, every score a mark.
    assert [len(line.get_xdata()) for line in groups.lines if line.get_marker() == "."] == [27, 27]
    (marks,) = [line for line in groups.lines if line.get_marker() == "s"]
    assert np.asarray(marks.get_ydata()) == pytest.approx(-np.array([0.5, 1.0, 2.0]) / np.sqrt(np.mean(scores**2)))
    assert reference.get_color() != near.get_color()
