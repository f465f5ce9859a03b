"""What a row of a preference set asks: a prompt, answers that are good and answers that are not, as pairs of one of each.

Rows of most data sets are a pair, and are left to the readers of :mod:`megatron_rmipo.data.layouts`. Benchmarks with several
answers a prompt become several pairs, in which every answer stands at least once; their figures are made of the answers' scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from megatron_rmipo.data.reading.rows import RowFault, shown

Kind = Literal["pair", "best_of", "ties", "styles"]
# Columns that may say which part of a set a row belongs to; the first that a row has counts.
SUBSET_COLUMNS = ("subset", "domain", "category", "kind")
NUM_STYLES = 3


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a set, as pairs.

    Attributes:
        kind: ``pair``; ``best_of``: one good answer among several (RewardBench 2); ``ties``: answers of which several may be
            equally good (its subset Ties); ``styles``: three good and three bad ones, plain to formatted (RM-Bench).
        subset: part of the set; "" where the row names none.
        name: how the row calls itself; "" where it does not.
        rows: a row of columns for each pair.
        answers: of each pair, which good and which bad answer it is made of.
    """

    kind: Kind
    subset: str
    name: str
    rows: list[dict[str, Any]]
    answers: list[tuple[int, int]]


def question_of(row: Mapping[str, Any], subset_column: str | None = None) -> Question:
    """What a row asks.

    Args:
        row: column -> value.
        subset_column: the column of its subset; None: the first of :data:`SUBSET_COLUMNS` with text.

    Raises:
        RowFault: lists of answers that are empty or no texts.
    """
    columns = SUBSET_COLUMNS if subset_column is None else (subset_column,)
    found = next((column for column in columns if isinstance(row.get(column), str)), None)
    subset = "" if found is None else str(row[found])
    name = str(row["id"]) if isinstance(row.get("id"), str | int) else ""
    if not (_holds_texts(row.get("chosen")) and _holds_texts(row.get("rejected"))):
        own = {column: value for column, value in row.items() if column not in (found, "id")}
        return Question("pair", subset, name, [own], [(0, 0)])
    good, bad = _texts(row, "chosen"), _texts(row, "rejected")
    prompt = row.get("prompt")
    size = max(len(good), len(bad))
    answers = [(number % len(good), number % len(bad)) for number in range(size)]
    rows = [{"prompt": prompt, "chosen": good[first], "rejected": bad[second]} for first, second in answers]
    return Question(_kind(row, subset, len(good), len(bad)), subset, name, rows, answers)


def _kind(row: Mapping[str, Any], subset: str, num_good: int, num_bad: int) -> Kind:
    if "domain" in row and num_good == num_bad == NUM_STYLES:
        return "styles"
    return "ties" if subset.lower() == "ties" or num_good > 1 else "best_of"


def _holds_texts(value: object) -> bool:
    """Whether a value is a list of answers and not one answer as messages."""
    return isinstance(value, list) and not any(isinstance(item, Mapping) for item in value)


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    texts: list[str] = row[column]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RowFault("not_text", column, f"a list of answers as texts expected, found {shown(texts)}")
    return texts
