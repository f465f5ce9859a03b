"""What a chat template is given beside the messages: the row's tools, documents and ``chat_template_kwargs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rmipo.data.layouts.messages import from_json, is_empty, without_nulls
from megatron_rmipo.data.reading.rows import Row, RowFault, shown

VARIABLE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
# What the conversation, the tokenizer and the caller decide.
_NOT_OURS = frozenset(
    [
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "raise_exception",
        "strftime_now",
    ]
)


def template_variables(row: Row) -> dict[str, Any]:
    """The template's variables that a row has, each given as such or as JSON text; what is null or empty is not there.

    Raises:
        RowFault: one is not of the form that templates expect, or sets what is not the row's to set.
    """
    variables: dict[str, Any] = {}
    for name in ("tools", "documents"):
        if not is_empty(given := _value(row.get(name), name)):
            variables[name] = _mappings(given, name)
    given = _value(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if is_empty(given):
        return variables
    if not isinstance(given, Mapping):
        raise RowFault("malformed", "chat_template_kwargs", f"a mapping expected, found {shown(given)}")
    for name, value in given.items():
        if name in _NOT_OURS or name.endswith("_token"):
            raise RowFault("malformed", "chat_template_kwargs", f"{name} is not the row's to set")
        if value is not None:
            variables[name] = value
    return variables


def _value(given: Any, field: str) -> Any:
    """A value as it is, nulls within mappings apart, or what its JSON text holds."""
    if isinstance(given, str):
        return from_json(given, field, "JSON") if given.strip() else None
    return without_nulls(given)


def _mappings(given: Any, field: str) -> list[Any]:
    items = [_value(item, field) for item in given] if isinstance(given, list) else [given]
    for item in items:
        if not isinstance(item, Mapping):
            raise RowFault("malformed", field, f"a list of mappings expected, found {shown(item)}")
    return items
