"""Figures of margins against slow ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_rmipo.evaluation.figures import (
    agreement_of,
    calibration_error,
    credits_of,
    deciles,
    length_bias,
    mcnemar,
    mean_interval,
)


def margins(count: int, seed: int = 3) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0.3, 1.0, count)
    values[::7] = 0.0
    return values


def test_ties_count_one_half() -> None:
    assert credits_of(np.array([0.2, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


def test_the_interval_is_that_of_a_slow_bootstrap_over_questions() -> None:
    values = credits_of(margins(23))
    questions = np.array([9, 4, 4, 4, 1] * 4 + [7, 7, 8])
    found = mean_interval(values, questions, samples=211, seed=5)
    groups = [values[questions == number] for number in sorted(set(questions.tolist()))]
    generator, means = np.random.default_rng(5), []
    for drawn in generator.integers(len(groups), size=(211, len(groups))):
        members = [value for number in drawn.tolist() for value in groups[number].tolist()]
        means.append(sum(members) / len(members))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert found == mean_interval(values, questions, samples=211, seed=5)
    assert found != mean_interval(values, questions, samples=211, seed=6)


def test_the_interval_of_many_pairs_is_nearly_the_normal_one() -> None:
    values = credits_of(margins(60_001))
    found = mean_interval(values, np.arange(len(values)), samples=400, seed=0)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_tenths_go_from_the_least_certain_to_the_most() -> None:
    values = margins(47)
    found = deciles(values)
    ordered = sorted(values.tolist(), key=abs)
    assert [part.num_pairs for part in found] == [5] * 7 + [4] * 3
    assert (found[0].least, found[-1].greatest) == (0.0, abs(ordered[-1]))
    assert found[-1].accuracy == sum(value > 0 for value in ordered[-4:]) / 4
    assert [part.num_pairs for part in deciles(values[:3])] == [1, 1, 1]


def test_calibration_error_against_bins_counted_one_by_one() -> None:
    values = 3 * margins(301)
    bins: dict[int, list[tuple[float, float]]] = {}
    for value in values.tolist():
        confidence = 1 / (1 + math.exp(-abs(value)))
        right = 0.5 if value == 0 else float(value > 0)
        bins.setdefault(min(9, int((confidence - 0.5) / 0.05)), []).append((confidence, right))
    gaps = [len(its) * abs(sum(c for c, _ in its) - sum(r for _, r in its)) / len(its) for its in bins.values()]
    assert calibration_error(values) == pytest.approx(sum(gaps) / 301)
    # Margins that are the log-odds of being right are calibrated; twice as large ones are not.
    odds = np.random.default_rng(1).normal(0, 2, 40_000)
    drawn = np.random.default_rng(2).random(40_000) < 1 / (1 + np.exp(-odds))
    true = np.where(drawn == (odds > 0), np.abs(odds), -np.abs(odds))
    assert calibration_error(true) < 0.01
    assert calibration_error(2 * true) > 0.04


def test_length_bias_is_told_by_which_response_is_longer() -> None:
    lengths = np.array([[5, 3], [2, 9], [4, 4], [8, 1]])
    found = length_bias(np.array([1.0, -1.0, 0.0, -2.0]), lengths)
    assert found == {"longer": (2, 0.5), "shorter": (1, 0.0), "equal": (1, 0.5)}
    assert length_bias(np.array([1.0]), lengths[:1])["shorter"] == (0, None)


@pytest.mark.parametrize(("alone", "other"), [(0, 0), (3, 3), (9, 2), (0, 5), (130, 171)])
def test_mcnemar_is_a_fair_coin_s_two_tails(alone: int, other: int) -> None:
    total = alone + other
    tail = sum(math.comb(total, k) for k in range(max(alone, other), total + 1)) / 2**total
    assert mcnemar(alone, other) == pytest.approx(min(1.0, 2 * tail))


def test_agreement_counts_who_is_right_where() -> None:
    first, second = np.array([1.0, 1.0, -1.0, -1.0, 0.0, 2.0]), np.array([1.0, -1.0, 1.0, -2.0, 0.0, 3.0])
    found = agreement_of(first, second, np.arange(6), samples=50, seed=0)
    assert (found.both_right, found.first_alone, found.second_alone, found.neither) == (2, 1, 1, 2)
    assert (found.agreement, found.p_value, found.difference.value) == (pytest.approx(4 / 6), 1.0, 0.0)
