"""Numbers of a row: the scores of its two answers, and what objectives read of the pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megatron_rmipo.data.layouts.labels import plain_value
from megatron_rmipo.data.reading.rows import Row, RowFault, shown

ON_INVERTED = ("keep", "drop", "swap", "error")
# Where public data sets keep the two scores; a tie between them says that nobody preferred anything.
SCORE_COLUMNS = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
SCORE_NAMES = frozenset(itertools.chain.from_iterable(SCORE_COLUMNS))
VALUE_COLUMNS = ("margin", "beta", "weight")
_AT_LEAST: Mapping[str, tuple[float, bool]] = {"beta": (0, False), "weight": (0, True)}  # (bound, itself allowed)


def number_of(value: Any, field: str) -> float:
    """A finite number, written as one or as text.

    Raises:
        RowFault: it is none.
    """
    if type(value) is float and math.isfinite(value):  # most are
        return value
    number = None if isinstance(value, bool) else plain_value(value)
    if not isinstance(number, float) or not math.isfinite(number):
        raise RowFault("not_number", field, f"a finite number expected, found {shown(value)}")
    return number


def compare_scores(row: Row) -> tuple[float, str]:
    """(the chosen answer's score less the rejected one's, which columns say so); (1, "") where a row scores nothing.

    The columns are those of :data:`SCORE_COLUMNS`, of the row or of its ``metadata``; NaN is a score that is missing. Where
    several columns score both answers and disagree, the first that finds the chosen answer no better counts.

    Raises:
        RowFault: a score is no number.
    """
    for chosen, rejected, high, low in _both_scores(row):
        difference = number_of(high, chosen) - number_of(low, rejected)
        if difference <= 0:
            return difference, f"{chosen} is {high}, {rejected} {low}"
    return 1.0, ""


def score_difference(row: Row) -> float | None:
    """The chosen answer's score less the rejected one's, by the first of :data:`SCORE_COLUMNS` that it or its ``metadata`` has.

    Returns:
        None where it has none.

    Raises:
        RowFault: a score is no number.
    """
    for chosen, rejected, high, low in _both_scores(row):
        return number_of(high, chosen) - number_of(low, rejected)
    return None


def _both_scores(row: Row) -> Iterator[tuple[str, str, Any, Any]]:
    """(column, column, score, score) of chosen and rejected answer, where a row has both; NaN is a score that is missing."""
    metadata = row.get("metadata")
    for holder in (row, metadata if isinstance(metadata, dict) else {}):
        for chosen, rejected in SCORE_COLUMNS:
            high = holder.get(chosen)
            if high is None or (low := holder.get(rejected)) is None or high != high or low != low:
                continue
            yield chosen, rejected, high, low


def pair_values(row: Row) -> dict[str, float]:
    """The numbers of :data:`VALUE_COLUMNS` that a row has.

    Raises:
        RowFault: one is no finite number in fp32, as which it is kept; beta is not positive or weight is negative.
    """
    values = {}
    for name in VALUE_COLUMNS:
        if row.get(name) is not None:
            try:
                values[name] = number_of(row[name], name)
            except RowFault as fault:
                remedy = f"; --ignore-columns {name} leaves out a column that is not for an objective"
                raise RowFault(fault.reason, name, fault.message + remedy) from None
    with np.errstate(over="ignore"):
        kept = {name: float(np.float32(value)) for name, value in values.items()}
    for name, value in kept.items():
        if not math.isfinite(value):
            raise RowFault("not_number", name, f"{name} is {values[name]:g}, which is beyond the numbers of fp32")
    for name, (bound, itself) in _AT_LEAST.items():
        if name in kept and not (kept[name] > bound or (itself and kept[name] == bound)):
            raise RowFault(
                "not_number", name, f"{name} is {values[name]:g}; it must be {'at least' if itself else 'above'} {bound}"
            )
    return values
