"""Win rates of a model over a baseline, plain and at equal length, from verdicts in both orders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Of a win, by the verdict on (A, B); the model is A.
_SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}
# A verdict, in words of the other order.
SWAPPED = {"A": "B", "B": "A", "tie": "tie"}
_PENALTY = 0.01
_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share with its standard error; None where one judgment is too few for one."""

    value: float
    error: float | None


def score_of(first: str | None, second: str | None) -> float | None:
    """What a question counts: 1 for a win, 0 for a loss, one half for a tie; None where a verdict is missing.

    Args:
        first: the verdict with the model's answer as A.
        second: that with the model's answer as B.

    A judge that says otherwise once the answers have changed places has not decided: a tie.
    """
    if first is None or second is None:
        return None
    return _SCORES[first] if first == SWAPPED[second] else 0.5


def win_rate(scores: Sequence[float]) -> Rate:
    """The mean score."""
    array = np.asarray(scores, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Rate(float(array.mean()), error)


def length_controlled_win_rate(scores: Sequence[float], lengths: Sequence[int], baseline_lengths: Sequence[int]) -> Rate:
    """The win rate that a model would have with answers as long as the baseline's, in the way of length-controlled AlpacaEval.

    The probability of a win is modelled as ``sigmoid(theta + phi tanh(d / s))``, where ``d`` is how many characters longer the
    model's answer is and ``s`` the standard deviation of ``d``; ``theta`` and ``phi`` minimize the cross-entropy with the scores
    plus ``0.005 (theta^2 + phi^2)``, which keeps them finite where every question is won. The rate is ``sigmoid(theta)``: the
    length term is left out. AlpacaEval's formula (arXiv 2404.04475, eq. 1) has a further term, the difficulty of each instruction
    as fitted over its leaderboard, which other questions do not have: its own program gives its numbers.

    Args:
        scores: of each question, see :func:`score_of`.
        lengths, baseline_lengths: characters of the two answers to each question.

    Returns:
        The rate; its error is that of the estimating equations (sandwich), carried through the sigmoid.
    """
    won = np.asarray(scores, dtype=np.float64)
    longer = np.asarray(lengths, dtype=np.float64) - np.asarray(baseline_lengths, dtype=np.float64)
    spread = longer.std(ddof=1) if len(longer) > 1 else 0.0
    features = np.stack([np.ones_like(won), np.tanh(longer / spread) if spread > 0 else np.zeros_like(won)], axis=1)
    weights = np.zeros(2)
    for _ in range(_STEPS):
        step = np.linalg.solve(_curvature(features, weights), _gradients(features, weights, won).sum(0) + _PENALTY * weights)
        # A Newton step may overshoot where a sigmoid is flat.
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-30))
        weights -= step
        if np.abs(step).max() < 1e-12:
            break
    rate = float(_sigmoid(weights[0]))
    if len(won) < 2:
        return Rate(rate, None)
    gradients = _gradients(features, weights, won)
    inverse = np.linalg.inv(_curvature(features, weights))
    variance = (inverse @ (gradients.T @ gradients) @ inverse)[0, 0]
    return Rate(rate, rate * (1 - rate) * math.sqrt(variance))


def _sigmoid(values: Any) -> Any:
    return np.exp(-np.logaddexp(0, -values))


def _gradients(features: np.ndarray, weights: np.ndarray, won: np.ndarray) -> Any:
    """Of each question's cross-entropy, ``[N, 2]``."""
    return (_sigmoid(features @ weights) - won)[:, None] * features


def _curvature(features: np.ndarray, weights: np.ndarray) -> Any:
    """Of the sum and its penalty, ``[2, 2]``."""
    shares = _sigmoid(features @ weights)
    return (features.T * (shares * (1 - shares))) @ features + _PENALTY * np.eye(2)
