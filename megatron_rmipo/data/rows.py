"""Rows of preference data sets in their many shapes -> :class:`PreferencePair`.

A format is one function from a row (column -> value) to a pair; :data:`FORMATS` lists them. A row that cannot be used raises
:class:`RowFault` with a reason from :data:`REASONS`, which the caller counts and lists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_rmipo.errors import DataError

REASONS = {
    "malformed": "not readable as a row of this format",
    "missing_field": "a column is absent or null",
    "not_text": "a value that should be text is something else",
    "bad_turns": "the conversation's turns are in an impossible order",
    "empty_prompt": "the prompt has no text",
    "empty_response": "a response has no text, or no tokens",
    "identical": "both responses are the same",
    "tied": "both responses have the same score",
    "prompt_mismatch": "chosen and rejected answer different prompts",
    "template": "the chat template refuses the conversation",
    "special_token": "a response holds its end-of-turn token before its end",
    "too_long": "longer than --seq-length (with --overlong drop)",
    "response_too_long": "a response and what must stay of the prompt exceed --seq-length",
    "boundary": "the vocabulary merges text across the boundary differently for the two responses (with --overlong official)",
}

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Where public data sets keep the two scores; a tie between them says that nobody preferred anything.
SCORE_COLUMNS = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
COLUMN_NAMES = ("prompt", "chosen", "rejected", "system", "conversations", "chosen_score", "rejected_score")
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"

Row = Mapping[str, Any]


class RowFault(Exception):
    """One row cannot be used.

    Args:
        reason: a key of :data:`REASONS`.
        field: the column at fault, empty where none is.
        message: what is wrong, with the value.
    """

    def __init__(self, reason: str, field: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason, self.field, self.message = reason, field, message


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: ``role`` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """A prompt of one or more turns, the last not the assistant's, and two answers to it."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str


def text_of(row: Row, field: str) -> str:
    """The text in a column.

    Raises:
        RowFault: it is absent or not text.
    """
    value = _value_of(row, field)
    if not isinstance(value, str):
        raise RowFault("not_text", field, f"text expected, found {_shown(value)}")
    return value


def _value_of(row: Row, field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise RowFault("missing_field", field, "null" if field in row else f"absent; the row has {', '.join(row) or 'no columns'}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _turn(message: object, field: str) -> Turn:
    """A message in OpenAI's (role, content) or ShareGPT's (from, value) spelling."""
    if not isinstance(message, Mapping):
        raise RowFault("not_text", field, f"a message with role and content expected, found {_shown(message)}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("malformed", field, f"a message has the role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):  # a list of typed parts, text alone
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise RowFault("not_text", field, f"a message has parts other than text: {_shown(content)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault("not_text", field, f"the {role} message's content is {_shown(content)}")
    return Turn(ROLES[role], content)


def _turns(value: object, field: str) -> tuple[Turn, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault("not_text", field, f"a list of messages expected, found {_shown(value)}")
    return tuple(_turn(message, field) for message in value)


def _answer(value: object, field: str) -> tuple[tuple[Turn, ...], str]:
    """Split a response given as text, one message, or messages whose last is the assistant's, into (turns before, text)."""
    if isinstance(value, str):
        return (), value
    turns = (_turn(value, field),) if isinstance(value, Mapping) else _turns(value, field)
    if not turns:
        raise RowFault("empty_response", field, "an empty list of messages")
    if turns[-1].role != "assistant":
        raise RowFault("bad_turns", field, f"the last message is the {turns[-1].role}'s, not the assistant's")
    return turns[:-1], turns[-1].content


def _with_system(row: Row, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (turns and turns[0].role == "system"):
        return (Turn("system", system), *turns)
    return turns


def parse_strings(row: Row) -> PreferencePair:
    """Columns prompt, chosen and rejected as text; the prompt is one user turn."""
    prompt = text_of(row, "prompt")
    return PreferencePair(_with_system(row, (Turn("user", prompt),)), text_of(row, "chosen"), text_of(row, "rejected"))


def parse_messages(row: Row) -> PreferencePair:
    """Columns chosen and rejected as message lists that end with the answer, with or without a prompt column.

    With a list of messages as prompt, the lists may repeat it or hold the answer alone; with a text as prompt (as in
    UltraFeedback-binarized) and whole conversations beside it, the conversations count.
    """
    before_chosen, chosen = _answer(_value_of(row, "chosen"), "chosen")
    before_rejected, rejected = _answer(_value_of(row, "rejected"), "rejected")
    _require_same_prompt(before_chosen, before_rejected)
    prompt = row.get("prompt")
    given = () if prompt is None else (Turn("user", prompt),) if isinstance(prompt, str) else _turns(prompt, "prompt")
    if not isinstance(prompt, str) and before_chosen[: len(given)] != given:
        before_chosen = given + before_chosen
    elif not before_chosen:
        before_chosen = given
    if not before_chosen:
        raise RowFault("missing_field", "prompt", "no prompt column, and no messages before the answers")
    return PreferencePair(_with_system(row, before_chosen), chosen, rejected)


def parse_sharegpt(row: Row) -> PreferencePair:
    """Column conversations (from/value or role/content messages), answers in chosen and rejected."""
    turns = _turns(_value_of(row, "conversations"), "conversations")
    before_chosen, chosen = _answer(_value_of(row, "chosen"), "chosen")
    before_rejected, rejected = _answer(_value_of(row, "rejected"), "rejected")
    _require_same_prompt(before_chosen, before_rejected)
    if before_chosen and before_chosen[: len(turns)] != turns:
        raise RowFault("prompt_mismatch", "chosen", "the messages before the answer are not the conversation")
    return PreferencePair(_with_system(row, before_chosen or turns), chosen, rejected)


def parse_hh(row: Row) -> PreferencePair:
    """Anthropic-HH transcripts; with a prompt column it holds the transcript and chosen and rejected the answers alone."""
    if row.get("prompt") is not None:
        prompt = transcript_turns(text_of(row, "prompt"), "prompt")
        if prompt[-1] == Turn("assistant", ""):  # the transcript ends with the mark that the answer follows
            prompt = prompt[:-1]
        return PreferencePair(prompt, text_of(row, "chosen").strip(), text_of(row, "rejected").strip())
    chosen = transcript_turns(text_of(row, "chosen"), "chosen")
    rejected = transcript_turns(text_of(row, "rejected"), "rejected")
    for field, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise RowFault("bad_turns", field, "the transcript ends with a Human turn, there is no answer")
    _require_same_prompt(chosen[:-1], rejected[:-1])
    return PreferencePair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def transcript_turns(text: str, field: str) -> tuple[Turn, ...]:
    r"""Turns of ``\n\nHuman: ...\n\nAssistant: ...``; text before the first mark is a system turn.

    Raises:
        RowFault: there is no ``Human:`` mark.
    """
    if text.startswith(HUMAN_MARK.lstrip()):
        text = "\n\n" + text
    head, *pieces = _split_at_marks(text)
    if not any(role == "user" for role, _ in pieces):
        raise RowFault("malformed", field, f"no {HUMAN_MARK!r} in the transcript {_shown(text)}")
    turns = [Turn(role, content.strip()) for role, content in pieces]
    return tuple(([Turn("system", head[1].strip())] if head[1].strip() else []) + turns)


def _split_at_marks(text: str) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    role, position = "system", 0
    while True:
        marks = [(text.find(mark, position), mark, name) for mark, name in ((HUMAN_MARK, "user"), (ASSISTANT_MARK, "assistant"))]
        found = min((mark for mark in marks if mark[0] >= 0), default=None)
        if found is None:
            return [*parts, (role, text[position:])]
        start, mark, name = found
        parts.append((role, text[position:start]))
        role, position = name, start + len(mark)


def _require_same_prompt(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> None:
    if tuple(chosen) == tuple(rejected):
        return
    if len(chosen) != len(rejected):
        detail = f"{len(chosen)} turns before the chosen answer, {len(rejected)} before the rejected one"
    else:
        number = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
        detail = f"turn {number + 1} is {_shown(chosen[number].content)} and {_shown(rejected[number].content)}"
    raise RowFault("prompt_mismatch", "rejected", detail)


FORMATS: dict[str, Callable[[Row], PreferencePair]] = {
    "strings": parse_strings,
    "messages": parse_messages,
    "hh": parse_hh,
    "sharegpt": parse_sharegpt,
}


def recognise_format(rows: Iterable[Row]) -> str:
    """The format of the first row that shows one.

    Raises:
        DataError: none does; names the columns found.
    """
    columns: list[str] = []
    for row in rows:
        columns = columns or list(row)
        chosen, prompt = row.get("chosen"), row.get("prompt")
        if chosen is None or row.get("rejected") is None:
            continue
        if row.get("conversations") is not None:
            return "sharegpt"
        if isinstance(prompt, str) and isinstance(chosen, str):
            return "hh" if prompt.startswith((HUMAN_MARK, HUMAN_MARK.lstrip())) and ASSISTANT_MARK in prompt else "strings"
        if isinstance(chosen, str) and prompt is None and HUMAN_MARK in "\n\n" + chosen and ASSISTANT_MARK in chosen:
            return "hh"
        if isinstance(chosen, Mapping | list) or isinstance(prompt, list):
            return "messages"
    raise DataError(
        f"the format of the rows is not recognised; their columns are: {', '.join(columns) or '(no rows)'}\n"
        f"Name it with --format ({', '.join(FORMATS)}), or name the columns with\n"
        "--columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN."
    )


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the columns of ``--columns`` under our names; a dotted name reaches into nested values."""
    if not columns:
        return row
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    for ours, theirs in columns.items():
        value: Any = row.get(theirs)
        if theirs not in row and "." in theirs:
            value = row
            for part in theirs.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            renamed[ours] = value
    return renamed


def parse_columns(text: str | None) -> dict[str, str]:
    """``prompt=instruction,chosen=good`` -> ours to theirs.

    Raises:
        DataError: not of that form, or an unknown name on the left.
    """
    columns: dict[str, str] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        ours, equals, theirs = (part.strip() for part in item.partition("="))
        if not (ours and equals and theirs) or ours not in COLUMN_NAMES:
            raise DataError(f"--columns: {item.strip()!r} is not NAME=COLUMN with NAME one of {', '.join(COLUMN_NAMES)}.")
        if ours in columns:
            raise DataError(f"--columns: {ours} is given twice.")
        columns[ours] = theirs
    return columns


def parse_row(row: Row, parse: Callable[[Row], PreferencePair], *, keep_ties: bool = False) -> PreferencePair:
    """Parse one row and check the pair.

    Args:
        row: columns under our names.
        parse: one of :data:`FORMATS`.
        keep_ties: accept pairs whose two scores are equal.

    Raises:
        RowFault: the row cannot be used.
    """
    if not keep_ties:
        _refuse_tie(row)
    pair = parse(row)
    turns = tuple(turn for turn in pair.prompt if turn.content.strip() or turn.role != "system")
    if not any(turn.content.strip() for turn in turns if turn.role != "system"):
        raise RowFault("empty_prompt", "prompt", "the prompt has no text")
    if turns[-1].role not in ("user", "tool"):
        raise RowFault("bad_turns", "prompt", f"the prompt ends with a turn of the {turns[-1].role}, not of the user")
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowFault("bad_turns", "prompt", "a system turn stands behind the first turn")
    for field, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not response.strip():
            raise RowFault("empty_response", field, "the response has no text")
    if pair.chosen.strip() == pair.rejected.strip():
        raise RowFault("identical", "rejected", "the same text as chosen")
    return PreferencePair(turns, pair.chosen, pair.rejected)


def _refuse_tie(row: Row) -> None:
    metadata = row.get("metadata")
    for holder in (row, metadata if isinstance(metadata, Mapping) else {}):
        for chosen, rejected in SCORE_COLUMNS:
            high, low = holder.get(chosen), holder.get(rejected)
            if isinstance(high, int | float) and isinstance(low, int | float) and high == low:
                raise RowFault("tied", rejected, f"{chosen} and {rejected} are both {high}")


def excerpt(row: object, limit: int = 400) -> str:
    """The beginning of a row as text, for the list of rejected rows."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
