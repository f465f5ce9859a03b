"""A preference pair or a row with one answer, the columns it comes from, and the reasons why a row cannot be used.

A row that cannot be used raises :class:`RowFault` with a reason from :data:`REASONS`, which the caller counts and lists. How the
columns make a pair is the business of :mod:`megatron_rmipo.data.layouts`.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

REASONS = {
    "malformed": "not readable as a row of this format",
    "not_utf8": "the line or cell is not in UTF-8, as the rest of its file is",
    "missing_field": "a column is absent or null",
    "not_text": "a value that should be text is something else",
    "not_encodable": "the text holds half of a surrogate pair, which is no character",
    "bad_turns": "the conversation's turns are in an impossible order",
    "empty_prompt": "the prompt has no text",
    "empty_response": "a response has no text, or no tokens",
    "identical": "both responses are the same",
    "bad_label": "a label says neither true nor false, or not which answer won",
    "not_number": "a score, margin, beta or weight is not a number that can be one",
    "inverted": "the chosen response scores lower than the rejected one (with --on-inverted drop or error)",
    "unread": "a column or a message's field would change what is learned, and nobody reads it",
    "mixed": "a row of another kind than the data set's: a pair, an unpaired row or a supervised one",
    "tied": "both responses have the same score",
    "prompt_mismatch": "chosen and rejected answer different prompts",
    "template": "the chat template refuses the conversation",
    "special_token": "a response holds its end-of-turn token before its end",
    "too_long": "longer than --seq-length (with --overlong drop)",
    "response_too_long": "a response and what must stay of the prompt exceed --seq-length",
    "boundary": "the vocabulary merges text across the boundary differently for the two responses (with --overlong official)",
}

COLUMN_NAMES = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "conversations",
    "messages",
    "completion",
    "response",
    "label",
    "chosen_score",
    "rejected_score",
    "instruction",
    "input",
    "history",
    "first",
    "second",
    "winner",
    "tools",
    "documents",
    "chat_template_kwargs",
    "margin",
    "beta",
    "weight",
)
Row = Mapping[str, Any]
_Value = TypeVar("_Value")


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


NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Turn(NamedTuple):
    """One message.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: its text.
        fields: what else of it a chat template may render, under the names templates know, such as ``tool_calls``, ``name``,
            ``reasoning_content``.
    """

    role: str
    content: str
    fields: Mapping[str, Any] = NOTHING


def answer(text: str) -> Turn:
    """The assistant's turn that holds a text and nothing else."""
    return Turn("assistant", text)


class PreferencePair(NamedTuple):
    """A prompt of one or more turns, the last not the assistant's, and two answers to it, or one.

    A supervised row and an unpaired row with the label true have a chosen answer alone, one with the label false a rejected one
    alone.

    Attributes:
        prompt: the turns before the answer.
        chosen, rejected: the assistant's turn that answers.
        variables: what the chat template is given beside the messages, such as ``tools``, ``documents`` and those of
            ``chat_template_kwargs``.
        values: numbers of this pair for objectives that read them: ``margin``, ``beta``, ``weight``.
    """

    prompt: tuple[Turn, ...]
    chosen: Turn | None
    rejected: Turn | None
    variables: Mapping[str, Any] = NOTHING
    values: Mapping[str, float] = NOTHING

    @property
    def responses(self) -> dict[str, Turn]:
        """The answers there are, in the order chosen, rejected, by the field to name in messages."""
        if self.chosen is not None and self.rejected is not None:
            return {"chosen": self.chosen, "rejected": self.rejected}
        only = self.rejected if self.chosen is None else self.chosen
        assert only is not None, "a row without an answer"
        return {"response": only}

    def in_place(self, values: Sequence[_Value]) -> tuple[_Value | None, _Value | None]:
        """What belongs to each of :attr:`responses`, in their order, as (chosen, rejected), None for the answer there is not."""
        if self.chosen is not None and self.rejected is not None:
            chosen, rejected = values
            return chosen, rejected
        (value,) = values
        return (None, value) if self.chosen is None else (value, None)


def text_of(row: Row, field: str) -> str:
    """The text in a column.

    Raises:
        RowFault: it is absent or not text.
    """
    value = value_of(row, field)
    if not isinstance(value, str):
        raise RowFault("not_text", field, f"text expected, found {shown(value)}")
    return value


def value_of(row: Row, field: str) -> Any:
    """The value in a column.

    Raises:
        RowFault: there is none.
    """
    value = row.get(field)
    if value is None:
        raise RowFault(
            "missing_field", field, "null" if field in row else f"absent; the row has {', '.join(row) or 'no columns'}"
        )
    return value


def shown(value: object) -> str:
    """A value's type and beginning, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def excerpt(row: object, limit: int = 400) -> str:
    """The beginning of a row as text, for the list of rejected rows."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
