"""Rows of one prompt and several answers in an order, as in NeMo-RL's preference layout and in Nectar."""

from __future__ import annotations

import re

from megatron_rmipo.data.layouts.conversations import (
    INSTRUCTIONS,
    Turns,
    answer_of,
    one_prompt,
    prompt_given,
    told_twice,
)
from megatron_rmipo.data.layouts.messages import is_empty
from megatron_rmipo.data.layouts.scores import number_of
from megatron_rmipo.data.layouts.transcripts import is_transcript, transcript_prompt
from megatron_rmipo.data.reading.rows import PreferencePair, Row, RowFault, shown, value_of

RANKED_COLUMNS = ("completions", "answers", "responses")
_PROMPTS = ("context", "prompt", *INSTRUCTIONS)
_TEXTS = ("completion", "response", "answer", "text", "content")
_QUALITY = re.compile("score|rating|reward|rank|vote|selected", re.IGNORECASE)  # part of a name that may say which is better


def has_ranks(row: Row) -> bool:
    """Whether a row has a list of answers that carry ranks."""
    given = next((row[name] for name in RANKED_COLUMNS if row.get(name) is not None), None)
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(item, dict) and item.get("rank") is not None for item in given)
        and any(row.get(name) is not None for name in _PROMPTS)
    )


def parse_ranked(row: Row) -> PreferencePair:
    """The best of the answers as chosen, the worst as rejected, by their ``rank``, of which the lowest is the best.

    Answers without ranks are in their order, the best first, unless something else in them may say which is better. Of several
    with the same rank the first counts; those between the best and the worst are not used.

    Raises:
        RowFault: fewer than two, some with and some without a rank, all of one rank, a score instead of one, or one that cannot
            be read.
    """
    column = next((name for name in RANKED_COLUMNS if row.get(name) is not None), RANKED_COLUMNS[0])
    given = value_of(row, column)
    if not isinstance(given, list) or len(given) < 2:
        raise RowFault("malformed", column, f"a list of two or more answers expected, found {shown(given)}")
    ranks = [item.get("rank") if isinstance(item, dict) else None for item in given]
    if all(rank is None for rank in ranks):
        _refuse_other_marks(given, column)
        ranks = list(range(len(given)))
    numbers = [number_of(rank, column) for rank in ranks]
    if min(numbers) == max(numbers):
        raise RowFault("tied", column, f"all answers have the rank {numbers[0]:g}")
    before_best, best = answer_of(_answer(given[numbers.index(min(numbers))], column), column)
    before_worst, worst = answer_of(_answer(given[numbers.index(max(numbers))], column), column)
    field, prompt = _prompt(row)
    return PreferencePair(told_twice(prompt, one_prompt(before_best, before_worst), field), best, worst)


def _refuse_other_marks(given: list[object], column: str) -> None:
    """Refuse answers without ranks that are scored: they need not stand in the order of their scores."""
    marks = {name for item in given if isinstance(item, dict) for name in item if _QUALITY.search(name)}
    if marks:
        message = f"the answers have {', '.join(sorted(marks))}, which is not read, and no rank; give each a rank, 1 for the best"
        raise RowFault("unread", column, message)


def _answer(item: object, column: str) -> object:
    """What a ranked answer says: a text or messages, by itself or under one of the names such lists use."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return item
    found = [item[name] for name in _TEXTS if item.get(name) is not None]
    if len(found) != 1:
        raise RowFault("malformed", column, f"an answer under one of {', '.join(_TEXTS)} expected, found {shown(item)}")
    return found[0]


def _prompt(row: Row) -> tuple[str, Turns]:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and is_transcript(prompt, is_prompt=True) and is_empty(row.get("context")):
        return "prompt", transcript_prompt(prompt, "prompt")
    return prompt_given(row, _PROMPTS)
