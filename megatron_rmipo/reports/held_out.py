"""Held-out figures with what they stand on, the number of pairs and the standard error; and when they tell anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

# Fewer pairs tell nothing: the standard error of an accuracy near one half is above 0.07.
FEWEST_PAIRS = 50
# A difference counts where it is beyond so many of its standard errors.
_ERRORS_THAT_COUNT = 2.0
# Names in a record of metrics.jsonl: of a figure ``x`` its error, and its number of pairs where not all have a value.
NUM_PAIRS = "num_pairs"
# Shares of pairs: their error is that of a binomial distribution.
_SHARES = ("rewards/accuracies", "gamma/at_min", "gamma/at_max")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean over held-out pairs.

    Attributes:
        value: the mean, a share or a mean change.
        num_pairs: how many pairs have a value; None where a run of an earlier version did not record it.
        error: its standard error; None where it is not known, as with one pair, or with pairs that all have the same value.
    """

    value: float
    num_pairs: int | None
    error: float | None

    def text(self, form: str = ".3f") -> str:
        """``0.953 +- 0.013``; without an error the value alone."""
        return f"{self.value:{form}}" + plus_minus(self.error, form)

    @property
    def has_enough_pairs(self) -> bool:
        """Whether anything can be told from so many pairs."""
        return self.num_pairs is not None and self.num_pairs >= FEWEST_PAIRS

    @property
    def is_beyond_its_error(self) -> bool:
        """Whether a change or a difference is more than chance would make it."""
        return abs(self.value) > _ERRORS_THAT_COUNT * (self.error or 0.0)


def plus_minus(error: float | None, form: str = ".3f") -> str:
    """What follows a value that has this error."""
    return "" if error is None else f" +- {error:.{form.partition('.')[2]}}"


def standard_error(values: Sequence[float] | np.ndarray, *, is_share: bool = False) -> float | None:
    """The standard error of the mean of independent values: ``sd / sqrt(n)``; of a share ``sqrt(p (1 - p) / n)``.

    Args:
        values: a number per pair; of a share 0 or 1.
        is_share: whether they are a share's.

    Returns:
        None where the values do not tell it: fewer than two, all the same, or one that is not finite.
    """
    column = np.asarray(values, dtype=np.float64)
    if len(column) < 2 or not np.isfinite(column).all():
        return None
    spread = float(column.std(ddof=0 if is_share else 1))
    return spread / math.sqrt(len(column)) if spread > 0.0 else None


def share_of(values: Sequence[float]) -> Figure | None:
    """The share of ones among zeros and ones; None where there are none."""
    return Figure(sum(values) / len(values), len(values), standard_error(values, is_share=True)) if values else None


def mean_of(pairs: Sequence[Record], name: str) -> Figure | None:
    """The mean of a value over the pairs that have it; None where none has."""
    values = [pair[name] for pair in pairs if pair.get(name) is not None]
    if not values:
        return None
    return Figure(float(np.mean(values)), len(values), standard_error(values, is_share=name in _SHARES))


def mean_change(before: Sequence[Record], after: Sequence[Record], name: str) -> Figure | None:
    """The mean change of a value between two evaluations of the same pairs, with the error of the differences pair by pair.

    Returns:
        None where the evaluations are not of the same pairs, or no pair has the value in both.
    """
    if len(before) != len(after):
        return None
    both = [(first.get(name), last.get(name)) for first, last in zip(before, after, strict=True)]
    return mean_of([{"change": last - first} for first, last in both if first is not None and last is not None], "change")


def difference(first: Figure, second: Figure) -> Figure:
    """``first - second`` of two independent groups of pairs."""
    error = math.hypot(first.error or 0.0, second.error or 0.0)
    return Figure(first.value - second.value, None, error or None)


def recorded(record: Record, name: str) -> Figure | None:
    """A figure of an evaluation as metrics.jsonl has it; None where the evaluation has no such figure."""
    if record.get(name) is None:
        return None
    return Figure(record[name], record.get(f"{name}/n", record.get(NUM_PAIRS)), record.get(f"{name}/se"))


def errors_to_record(values: Mapping[str, Sequence[float] | np.ndarray], num_pairs: int) -> dict[str, float | int]:
    """What an evaluation's record holds besides its means.

    Args:
        values: name -> the values of the pairs that have one.
        num_pairs: pairs of the evaluation.

    Returns:
        ``num_pairs``; ``name/se``, where it is known; ``name/n``, where not all pairs have a value.
    """
    record: dict[str, float | int] = {NUM_PAIRS: num_pairs}
    for name, column in values.items():
        error = standard_error(column, is_share=name in _SHARES)
        if error is not None:
            record[f"{name}/se"] = error
        if 0 < len(column) < num_pairs:
            record[f"{name}/n"] = len(column)
    return record
