"""The formats of preference data sets, paired and unpaired, and of supervised ones.

:data:`FORMATS` lists them: each is a function from a row (column -> value) to a :class:`PreferencePair`, the columns it reads,
and how a row of it is known. What may stand beside the answers in any of them (``system``, ``tools``, scores, ``margin`` ...) is
the business of :mod:`megatron_rmipo.data.layouts.reader`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from megatron_rmipo.data.layouts.conversations import (
    INSTRUCTIONS,
    Turns,
    answer_of,
    one_prompt,
    prompt_given,
    prompt_of,
    same_turn,
    told_twice,
    turns_of,
    without_answer,
)
from megatron_rmipo.data.layouts.labels import LABEL_COLUMNS, is_desirable
from megatron_rmipo.data.layouts.messages import holds_messages, is_empty
from megatron_rmipo.data.layouts.ranked import RANKED_COLUMNS, has_ranks, parse_ranked
from megatron_rmipo.data.layouts.transcripts import is_transcript, parse_hh
from megatron_rmipo.data.layouts.which_won import WHICH_WON
from megatron_rmipo.data.reading.rows import NOTHING, PreferencePair, Row, RowFault, Turn, answer, text_of, value_of
from megatron_rmipo.errors import DataError

_CONVERSATIONS = ("conversations", "conversation", "messages")
_TOLD = frozenset(_CONVERSATIONS)
_ONE_ANSWER = ("messages", "conversations", "conversation", "completion", "response", "output")
_PROMPTS = ("prompt", *INSTRUCTIONS)


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        parse: a row's pair, or a :class:`RowFault`.
        reads: the columns it reads.
        matches: whether a row has its form.
        kind: what its rows hold.
    """

    parse: Callable[[Row], PreferencePair]
    reads: frozenset[str]
    matches: Callable[[Row], bool]
    kind: Literal["pairs", "supervised", "unpaired"] = "pairs"

    def __call__(self, row: Row) -> PreferencePair:
        """The row's pair."""
        return self.parse(row)


def parse_strings(row: Row) -> PreferencePair:
    """Columns prompt, chosen and rejected as text; the prompt is one user turn."""
    prompt = prompt_of(text_of(row, "prompt"), "prompt")
    return PreferencePair(prompt, answer(text_of(row, "chosen")), answer(text_of(row, "rejected")))


def parse_conversations(row: Row) -> PreferencePair:
    """Columns chosen and rejected as text, as messages, or as conversations that end with the answer.

    What stands before them may be told in ``prompt`` (text or messages), in ``conversations`` or in ``messages``, and again
    before the answers, by the rule of :mod:`megatron_rmipo.data.layouts.conversations`.
    """
    before_chosen, chosen = answer_of(value_of(row, "chosen"), "chosen")
    before_rejected, rejected = answer_of(value_of(row, "rejected"), "rejected")
    before = one_prompt(before_chosen, before_rejected)
    if not (before and before[0] == ("user", row.get("prompt"), NOTHING) and _TOLD.isdisjoint(row)):  # mostly it is that turn
        before = _whole_prompt(row, before, chosen)
    return PreferencePair(before, chosen, rejected)


def _whole_prompt(
    row: Row, before: Turns, response: Turn, answered_in: str = "", prompts: tuple[str, ...] = ("prompt",)
) -> Turns:
    """The one prompt of the messages before the answer and of the columns that tell it, too."""
    for name in _CONVERSATIONS:
        if name != answered_in and row.get(name) is not None:
            before = told_twice(without_answer(turns_of(row[name], name), response), before, name)
    if _has_any(row, prompts):
        name, given = prompt_given(row, prompts)
        before = told_twice(given, before, name)
    if not before:
        raise RowFault("missing_field", "prompt", "no prompt column, and no messages before the answer")
    return before


def parse_alpaca(row: Row) -> PreferencePair:
    """An instruction (or question, or query) with input and history, and two answers.

    They stand in chosen and rejected, in chosen_response and rejected_response, or both in output, the better first.
    """
    good, bad = "chosen", "rejected"
    if row.get("chosen_response") is not None and row.get(good) is None:
        good, bad = "chosen_response", "rejected_response"
    if row.get(good) is None and isinstance(row.get("output"), list):
        if len(row["output"]) != 2:
            raise RowFault("malformed", "output", f"two answers expected, the better first, found {len(row['output'])}")
        good, bad, row = "output.0", "output.1", {**row, "output.0": row["output"][0], "output.1": row["output"][1]}
    before_chosen, chosen = answer_of(value_of(row, good), good)
    before_rejected, rejected = answer_of(value_of(row, bad), bad)
    field, given = prompt_given(row, _PROMPTS)
    return PreferencePair(told_twice(given, one_prompt(before_chosen, before_rejected), field), chosen, rejected)


def parse_ms_swift(row: Row) -> PreferencePair:
    """A supervised row, whose answer is the chosen one, and the other in rejected_response or in rejected_messages."""
    bad = "rejected_messages" if row.get("rejected_response") is None else "rejected_response"
    before_rejected, rejected = answer_of(value_of(row, bad), bad)
    pair = parse_supervised(row)
    assert pair.chosen is not None
    return PreferencePair(one_prompt(pair.prompt, before_rejected), pair.chosen, rejected)


def parse_supervised(row: Row) -> PreferencePair:
    """One answer: the last of messages (as in UltraChat) or of conversations, or completion, response or output beside a prompt.

    Only the last answer of a conversation is one to learn; earlier ones belong to the prompt.
    """
    there = [name for name in _ONE_ANSWER if row.get(name) is not None]
    name = there[0] if there else _ONE_ANSWER[0]
    given = value_of(row, name)
    if name in _CONVERSATIONS:
        turns = turns_of(given, name)  # which text or one message is not
        given = given if turns else []
    before, response = answer_of(given, name)
    for other in there[1:]:
        if not is_empty(row[other]) and not same_turn(answer_of(row[other], other)[1], response):
            raise RowFault("unread", other, f"the row has an answer in {name} and another in {other}")
    return PreferencePair(_whole_prompt(row, before, response, name, _PROMPTS), response, None)


def parse_unpaired(row: Row) -> PreferencePair:
    """One answer as in :func:`parse_supervised`, and a label: a desirable answer is the chosen, another one the rejected."""
    desirable = is_desirable(row)
    pair = parse_supervised(row)
    return pair if desirable else PreferencePair(pair.prompt, None, pair.chosen)


def _has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _has_any(row: Row, names: tuple[str, ...]) -> bool:
    return any(row.get(name) is not None for name in names)


def _has_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _is_strings(row: Row) -> bool:
    return (
        _has_pair(row)
        and isinstance(row.get("prompt"), str)
        and isinstance(row["chosen"], str)
        and not holds_messages(row["chosen"])
    )


def _is_messages(row: Row) -> bool:
    told = holds_messages(row.get("prompt")) or holds_messages(row.get("messages"))
    return _has_pair(row) and (told or holds_messages(row["chosen"]) or holds_messages(row["rejected"]))


def _is_hh(row: Row) -> bool:
    if not _has_pair(row):
        return False
    prompt = row.get("prompt")
    return (
        is_transcript(row["chosen"])
        if prompt is None
        else isinstance(row["chosen"], str) and is_transcript(prompt, is_prompt=True)
    )


def _is_alpaca(row: Row) -> bool:
    has_two = isinstance(row.get("output"), list) or _has(row, "chosen_response", "rejected_response") or _has_pair(row)
    return has_two and _has_any(row, _PROMPTS)


def _is_ms_swift(row: Row) -> bool:
    has_bad = _has_any(row, ("rejected_response", "rejected_messages"))
    return has_bad and _has_any(row, _ONE_ANSWER) and not _has_any(row, ("chosen", "chosen_response"))


def _is_one_answer(row: Row) -> bool:
    """Whether a row has one answer: a conversation, or an answer beside a prompt."""
    if _has_any(row, ("chosen", "rejected_response", "rejected_messages")):
        return False
    if any(holds_messages(row.get(name)) for name in _CONVERSATIONS):
        return True
    return (_has_any(row, _PROMPTS) and _has_any(row, ("completion", "response"))) or (
        isinstance(row.get("output"), str) and _has_any(row, INSTRUCTIONS)
    )


def _is_unpaired(row: Row) -> bool:
    return _has_any(row, LABEL_COLUMNS) and _is_one_answer(row)


_ANSWERS = frozenset({"chosen", "rejected"})
_INSTRUCTION = frozenset({*INSTRUCTIONS, "history"})
_SUPERVISED = frozenset({"prompt", *_INSTRUCTION, *_ONE_ANSWER})
# The first that matches a row is its format: what is told apart by more columns stands first.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        parse_conversations,
        _ANSWERS | {"prompt", *_CONVERSATIONS},
        lambda row: _has_pair(row) and _has_any(row, ("conversations", "conversation")),
    ),
    "hh": Format(parse_hh, _ANSWERS | {"prompt"}, _is_hh),
    "messages": Format(parse_conversations, _ANSWERS | {"prompt", "messages"}, _is_messages),
    "strings": Format(parse_strings, _ANSWERS | {"prompt"}, _is_strings),
    "alpaca": Format(
        parse_alpaca, _ANSWERS | _INSTRUCTION | {"prompt", "output", "chosen_response", "rejected_response"}, _is_alpaca
    ),
    "ms_swift": Format(parse_ms_swift, _SUPERVISED | {"rejected_response", "rejected_messages"}, _is_ms_swift),
    "ranked": Format(parse_ranked, frozenset({"prompt", "context", *_INSTRUCTION, *RANKED_COLUMNS}), has_ranks),
    **{name: Format(layout.parse, layout.reads, layout.matches) for name, layout in WHICH_WON.items()},
    "supervised": Format(parse_supervised, _SUPERVISED, _is_one_answer, "supervised"),
    "unpaired": Format(parse_unpaired, _SUPERVISED | {*LABEL_COLUMNS}, _is_unpaired, "unpaired"),
}
_OF_PAIRS = {name: form for name, form in FORMATS.items() if form.kind == "pairs"}


def refuse_mixed(row: Row, name: str) -> None:
    """Refuse a pair where rows have one answer, such a row among pairs, and a labelled row in a supervised data set.

    A row without a label in an unpaired data set lacks a column; :func:`parse_unpaired` says so.

    Args:
        row: columns under our names.
        name: the data set's format.

    Raises:
        RowFault: the row is of another kind.
    """
    form = FORMATS[name]
    if form.kind == "pairs":
        if not form.matches(row) and _is_one_answer(row) and _pair_format(row) is None:
            raise RowFault("mixed", "chosen", "one answer alone, in data of pairs; preprocess such rows by themselves")
        return
    if _pair_format(row) is not None:
        also = " (the sft objective reads pairs too)" if name == "supervised" else ""
        raise RowFault("mixed", "rejected", f"a pair in {name} data; name its format with --format{also}")
    label = next((column for column in LABEL_COLUMNS if row.get(column) is not None), None)
    if name == "supervised" and label is not None:
        message = f"an answer labelled {row[label]} in supervised data; use --format unpaired, or --ignore-columns {label}"
        raise RowFault("mixed", label, message)


def _pair_format(row: Row) -> str | None:
    return next((name for name, form in _OF_PAIRS.items() if form.matches(row)), None)


def recognise_format(rows: Iterable[Row]) -> str:
    """The format of the rows: ``supervised`` or ``unpaired`` where that is the commonest kind, else that of the first pair.

    Raises:
        DataError: no row shows one; names the columns found.
    """
    columns: list[str] = []
    of_pairs: list[str] = []
    of_one_answer: collections.Counter[str] = collections.Counter()
    for row in rows:
        columns = columns or list(row)
        if (name := _pair_format(row)) is not None:
            of_pairs.append(name)
        elif _is_one_answer(row):
            of_one_answer["unpaired" if _is_unpaired(row) else "supervised"] += 1
    for name, count in of_one_answer.most_common(1):
        if count > len(of_pairs):
            return name
    if of_pairs:
        return of_pairs[0]
    raise DataError(
        f"the format of the rows is not recognised; their columns are: {', '.join(columns) or '(no rows)'}\n"
        "Name the columns:\n"
        "  pairs:            --columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN\n"
        "  which of two won: --columns prompt=COLUMN,first=COLUMN,second=COLUMN,winner=COLUMN\n"
        "  supervised rows:  --columns prompt=COLUMN,response=COLUMN\n"
        "  unpaired rows:    --columns prompt=COLUMN,response=COLUMN,label=COLUMN\n"
        f"or the format with --format: {', '.join(FORMATS)}."
    )
