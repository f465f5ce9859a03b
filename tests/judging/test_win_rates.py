"""Verdicts, scores of both orders, and win rates, the length-controlled one against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_rmipo.judging.verdicts import DEFAULT_TEMPLATE, as_conversation, fill_template, parse_verdict, read_template
from megatron_rmipo.judging.win_rates import length_controlled_win_rate, score_of, win_rate


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("So [[A]]", "A"),
        ("[[ b ]]", "B"),
        ("First [[A]], no: [[C]].", "tie"),
        ("[[A>>B]]", "A"),
        ("[[B>A]]", "B"),
        ("[[A<B]]", "B"),
        ("[[A=B]]", "tie"),
        ("[A] is better", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        ("A", "B", 1.0),
        ("B", "A", 0.0),
        ("tie", "tie", 0.5),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("A", "tie", 0.5),
        ("tie", "A", 0.5),
        ("A", None, None),
        (None, None, None),
    ],
)
def test_where_the_orders_differ_it_is_a_tie(first: str | None, second: str | None, score: float | None) -> None:
    assert score_of(first, second) == score


def test_texts_are_filled_in_as_they_are() -> None:
    text = fill_template(DEFAULT_TEMPLATE, "{answer_a}?", "a {b} \\1", "{question}")
    assert "<question>\n{answer_a}?\n</question>" in text
    assert "<answer_of_A>\na {b} \\1\n</answer_of_A>" in text
    assert "<answer_of_B>\n{question}\n</answer_of_B>" in text
    assert read_template(None) == DEFAULT_TEMPLATE
    assert as_conversation(("q",), ("a",)) == ("q", "a")
    question, answer = as_conversation(("p", "q"), ("a", "b"))
    assert (question, answer) == ("[turn 1]\np\n\n[turn 2]\nq", "[turn 1]\na\n\n[turn 2]\nb")


def made(seed: int, theta: float, phi: float, n: int = 401) -> tuple[list[float], list[int], list[int]]:
    """Scores drawn from the model, and lengths."""
    random = np.random.default_rng(seed)
    ours, theirs = random.integers(50, 900, n), random.integers(50, 500, n)
    longer = ours - theirs
    share = 1 / (1 + np.exp(-(theta + phi * np.tanh(longer / longer.std(ddof=1)))))
    scores = (random.random(n) < share).astype(float)
    scores[::9] = 0.5
    return scores.tolist(), ours.tolist(), theirs.tolist()


def test_the_length_controlled_rate_is_that_of_the_minimum() -> None:
    scores, ours, theirs = made(3, -0.4, 1.5)
    rate = length_controlled_win_rate(scores, ours, theirs)
    longer = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    feature, won = torch.tanh(longer / longer.std()), torch.tensor(scores, dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(weights[0] + weights[1] * feature, won, reduction="sum")
        value = value + 0.005 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    assert rate.value == pytest.approx(float(torch.sigmoid(weights[0].detach())), abs=1e-6)
    # Longer answers win here: at equal length there is less to win.
    assert rate.value < win_rate(scores).value - 0.05
    other = length_controlled_win_rate([1 - score for score in scores], theirs, ours)
    assert other.value == pytest.approx(1 - rate.value, abs=1e-9)


def test_errors_are_as_large_as_the_spread_over_samples() -> None:
    plain, controlled = [], []
    for seed in range(200):
        scores, ours, theirs = made(seed, -0.4, 1.5, n=151)
        plain.append(win_rate(scores))
        controlled.append(length_controlled_win_rate(scores, ours, theirs))
    for rates in (plain, controlled):
        spread = np.std([rate.value for rate in rates], ddof=1)
        told = np.mean([rate.error for rate in rates])
        assert spread == pytest.approx(told, rel=0.2)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_where_all_is_won_or_lost_the_rate_is_finite(score: float) -> None:
    rate = length_controlled_win_rate([score] * 30, list(range(30)), [5] * 30)
    assert abs(rate.value - score) < 0.02
    assert rate.error is not None
    assert math.isfinite(rate.error)


def test_one_question_or_equal_lengths() -> None:
    assert length_controlled_win_rate([0.5], [3], [9]).error is None
    assert win_rate([1.0]).error is None
    same = length_controlled_win_rate([1.0, 0.0, 1.0, 1.0], [5] * 4, [5] * 4)
    assert same.value == pytest.approx(0.75, abs=0.004)
