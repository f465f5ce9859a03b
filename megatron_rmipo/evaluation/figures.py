"""Figures of margins: accuracy with bootstrap intervals, calibration, length bias, agreement of two models.

Shape letters: P pairs, Q questions, of which each has one or more pairs, B samples of the bootstrap.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
_CONFIDENCE = 0.95
# Numbers of a piece of the bootstrap: 32 MB.
_NUMBERS_AT_ONCE = 1 << 22


class Interval(NamedTuple):
    """A figure and the bounds that hold it in 95 % of samples."""

    value: float
    low: float
    high: float


def credits_of(margins: Floats) -> Floats:
    """1 for a pair whose chosen response scores higher, 1/2 for a tie, 0 for the others; float64 ``[P]``."""
    return np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))


def mean_interval(values: Floats, questions: npt.NDArray[np.int64], *, samples: int, seed: int) -> Interval:
    """The mean of values of pairs, with a percentile interval over resampled questions.

    Pairs of one question are drawn together, since they share a prompt.

    Args:
        values: float64 ``[P]``, at least one.
        questions: int64 ``[P]``, numbers of their questions, in any order.
        samples: B.
        seed: of the draws.
    """
    _, places = np.unique(questions, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places).astype(np.float64)
    num_questions, generator = len(sums), np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, _NUMBERS_AT_ONCE // num_questions)
    for first in range(0, samples, step):
        drawn = generator.integers(num_questions, size=(min(step, samples - first), num_questions))
        means[first : first + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


class Decile(NamedTuple):
    """Pairs of like margins: how many, the least and the greatest ``|margin|``, and the share that is right."""

    num_pairs: int
    least: float
    greatest: float
    accuracy: float


def deciles(margins: Floats) -> list[Decile]:
    """Accuracy by ``|margin|``, from the least certain tenth of the pairs to the most certain; empty tenths are left out."""
    sizes = np.abs(margins)
    parts = np.array_split(np.argsort(sizes, kind="stable"), NUM_BINS)
    right = credits_of(margins)
    return [
        Decile(len(part), float(sizes[part[0]]), float(sizes[part[-1]]), float(right[part].mean())) for part in parts if len(part)
    ]


def calibration_error(margins: Floats) -> float:
    """Expected calibration error of ``sigmoid(|margin|)`` as the probability that the preferred response is the chosen one.

    Ten bins of equal width over [1/2, 1], weighed by their pairs. Source: Guo et al. 2017 (arXiv:1706.04599), eq. 5.
    """
    confidences = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((confidences - 0.5) * 2 * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=credits_of(margins) - confidences, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(margins))


def length_bias(margins: Floats, lengths: npt.NDArray[np.int64]) -> dict[str, tuple[int, float | None]]:
    """Pairs whose chosen response is longer, shorter or equally long in tokens: how many, and accuracy.

    Args:
        margins: float64 ``[P]``.
        lengths: ``[P, 2]``, tokens of the chosen and the rejected response.
    """
    difference, right = lengths[:, 0] - lengths[:, 1], credits_of(margins)
    groups = {"longer": difference > 0, "shorter": difference < 0, "equal": difference == 0}
    return {name: (int(group.sum()), float(right[group].mean()) if group.any() else None) for name, group in groups.items()}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two models judge the same pairs.

    Attributes:
        num_pairs: P.
        agreement: share of pairs with margins of the same sign.
        both_right, first_alone, second_alone, neither: numbers of pairs that are right in both, in one, in none; a tie is not
            right.
        p_value: of the two models being right equally often, exact and two-sided (McNemar).
        difference: accuracy of the first less that of the second.
    """

    num_pairs: int
    agreement: float
    both_right: int
    first_alone: int
    second_alone: int
    neither: int
    p_value: float
    difference: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "difference": self.difference._asdict()}


def agreement_of(first: Floats, second: Floats, questions: npt.NDArray[np.int64], *, samples: int, seed: int) -> Agreement:
    """Compare the margins, float64 ``[P]``, that two models give the same pairs."""
    right, other = first > 0, second > 0
    alone, other_alone = int((right & ~other).sum()), int((other & ~right).sum())
    return Agreement(
        num_pairs=len(first),
        agreement=float((np.sign(first) == np.sign(second)).mean()),
        both_right=int((right & other).sum()),
        first_alone=alone,
        second_alone=other_alone,
        neither=int((~right & ~other).sum()),
        p_value=mcnemar(alone, other_alone),
        difference=mean_interval(credits_of(first) - credits_of(second), questions, samples=samples, seed=seed),
    )


def mcnemar(first_alone: int, second_alone: int) -> float:
    """Probability of counts at least as uneven, were each pair that one model alone gets right either's with even chances."""
    total, most = first_alone + second_alone, max(first_alone, second_alone)
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(most, total + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - total * math.log(2)) for log in logs))
