"""A message as people write it -> a :class:`~megatron_rmipo.data.reading.rows.Turn`: its role, its text, and all else it holds.

What stands in a message counts or rejects the row:

- a field that is null or empty says nothing, also deep within tool calls and tool schemas, where Arrow and parquet fill in null
  for every key that other rows have; what is JSON text is taken as it is written;
- :data:`_BOOKKEEPING` names fields that say where a message comes from; they are left out;
- :data:`_LEARNED_MARKS` say whether a turn is learned. The answer is and no other turn, so a mark against that rejects the row;
  an earlier turn of the assistant is context whatever its mark;
- every other field goes to the chat template under its own name, calls and reasoning under the names templates use.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_rmipo.data.reading.rows import NOTHING, RowFault, Turn, shown

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = frozenset({"function_call", "tool_call"})  # the assistant's, its text the JSON of one call or of several
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text")
_BOOKKEEPING = frozenset(
    {
        *("id", "message_id", "uuid", "parent_id", "index", "turn", "turn_id", "timestamp", "created_at", "date"),
        *("lang", "language", "model", "model_name", "source", "score", "rating", "rank", "category"),
        *("num_tokens", "token_count", "finish_reason", "synthetic", "deleted"),
        *("toxic", "redacted", "country", "state", "hashed_ip", "header", "turn_identifier", "openai_id"),  # WildChat's
    }
)
_LEARNED_MARKS = frozenset({"weight", "train", "loss", "trainable", "learn"})
UNLEARNED = "(not learned)"  # a turn's field until its place is known: fine in a prompt, a contradiction in an answer
_REASONING = "reasoning_content"
_TEXT_PARTS, _REASONING_PARTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")
_PART_NOTES = frozenset({"type", "id", "index", "cache_control", "annotations"})
_MESSAGE_LIST = re.compile(r"\s*(\[\s*)?\{\s*([\"'])(role|from|content|value)\2\s*:")


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, white space, or a list or mapping of such values alone."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(text: str, field: str, what: str) -> Any:
    """What JSON text holds.

    Raises:
        RowFault: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault("malformed", field, f"{what} expected, found text that is no JSON ({error}): {shown(text)}") from None


def holds_messages(value: object) -> bool:
    """Whether a value is a message, messages, or the JSON text of them, by its looks."""
    return isinstance(value, dict | list) or (isinstance(value, str) and _MESSAGE_LIST.match(value) is not None)


def written_messages(value: Any, field: str) -> Any:
    """The messages of a value that is the JSON text of messages, else the value.

    Raises:
        RowFault: it is text that begins as messages do and is no JSON, such as Python's notation of them.
    """
    if not isinstance(value, str) or value[:1] not in "[{ \n\t\r" or not _MESSAGE_LIST.match(value):
        return value
    return from_json(value, field, "messages as JSON")


def without_fields(value: Any, names: frozenset[str]) -> Any:
    """A value of a column whose messages, also as JSON text, have no fields of these names; others stay as they are."""
    if isinstance(value, str) and holds_messages(value):
        with contextlib.suppress(RowFault):  # told where the column is read
            value = written_messages(value, "")
    if isinstance(value, list):
        return [without_fields(item, names) for item in value]
    if not isinstance(value, Mapping):
        return value
    if not value.keys().isdisjoint(_ROLE_KEYS):
        return {key: item for key, item in value.items() if key not in names or key in (*_ROLE_KEYS, *_TEXT_KEYS)}
    return {key: without_fields(item, names) for key, item in value.items()}


def turn_of(message: object, field: str) -> Turn:
    """A message in OpenAI's (role, content) or ShareGPT's (from, value) spelling, whatever the capitals of its role.

    Raises:
        RowFault: a role that is not known, content other than text, or a field that cannot be used.
    """
    if type(message) is dict and len(message) == 2:  # most are nothing else
        role, content = message.get("role"), message.get("content")
        if type(content) is str and type(role) is str and role in ROLES:
            return Turn(ROLES[role], content)
    if not isinstance(message, dict):
        raise RowFault("not_text", field, f"a message with role and content expected, found {shown(message)}")
    return _full_turn(message, field)


def _full_turn(message: Mapping[str, Any], field: str) -> Turn:
    written = _one_of(message, _ROLE_KEYS, field)
    if written is None:
        raise RowFault("malformed", field, f"a message has no role: {shown(message)}")
    name = written.strip().lower() if isinstance(written, str) else None
    if name is None or (name not in ROLES and name not in _CALL_ROLES):
        raise RowFault(
            "malformed", field, f"a message has the role {written!r}; known: {', '.join([*ROLES, *sorted(_CALL_ROLES)])}"
        )
    content, reasoning = _content(_one_of(message, _TEXT_KEYS, field), str(written), field)
    fields = {key: value for key, value in message.items() if key not in (*_ROLE_KEYS, *_TEXT_KEYS) and not is_empty(value)}
    role = ROLES.get(name, "assistant")
    marks = {mark: fields.pop(mark) for mark in _LEARNED_MARKS & fields.keys()}
    fields = {key: value for key, value in fields.items() if key not in _BOOKKEEPING}
    if any(_is_unlearned(mark, value, role, field) for mark, value in marks.items()):
        fields[UNLEARNED] = True
    if reasoning:
        if _REASONING in fields:
            raise RowFault("malformed", field, f"a message has reasoning both among its parts and in {_REASONING}")
        fields[_REASONING] = reasoning
    if name in _CALL_ROLES:
        fields["tool_calls"], content = (
            _as_list(from_json(content or "", field, f"the JSON of a call in a {written} message")),
            "",
        )
    fields = _with_tool_calls(fields, field)
    if content is None:
        if "tool_calls" not in fields:
            raise RowFault("not_text", field, f"the {written} message's content is {shown(content)}")
        content = ""
    return Turn(role, content, fields or NOTHING)


def _one_of(message: Mapping[str, Any], keys: tuple[str, ...], field: str) -> Any:
    """The one value that is not null under any of the keys."""
    found = [(key, message[key]) for key in keys if message.get(key) is not None]
    if len(found) > 1 and any(value != found[0][1] for _, value in found):
        both = " and ".join(f"{key} {shown(value)}" for key, value in found)
        raise RowFault("malformed", field, f"a message says two things: {both}")
    return found[0][1] if found else None


def _content(content: Any, role: str, field: str) -> tuple[str | None, str]:
    """The text of content, and the reasoning among its parts; text parts are joined, None stays."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise RowFault("not_text", field, f"the {role} message's content is {shown(content)}")
    texts: list[str] = []
    reasoning: list[str] = []
    for part in content:
        kind, text = _part(part, role, field)
        (reasoning if kind in _REASONING_PARTS else texts).append(text)
    return "".join(texts), "\n".join(reasoning)


def _part(part: object, role: str, field: str) -> tuple[str, str]:
    """(kind, text) of one part of a list of parts."""
    filled = {key: value for key, value in part.items() if not is_empty(value)} if isinstance(part, dict) else {}
    kind = filled.get("type", "text")
    texts = [part[key] for key in (*_TEXT_KEYS, *_REASONING_PARTS) if isinstance(part, dict) and isinstance(part.get(key), str)]
    rest = filled.keys() - _PART_NOTES - {*_TEXT_KEYS, *_REASONING_PARTS}
    if kind not in (*_TEXT_PARTS, *_REASONING_PARTS) or len(texts) != 1 or rest:
        raise RowFault("not_text", field, f"the {role} message has a part that is not text: {shown(part)}")
    return kind, texts[0]


def _is_unlearned(mark: str, value: Any, role: str, field: str) -> bool:
    """Whether a mark takes an assistant's turn from those that are learned; the others' never are.

    Raises:
        RowFault: it asks for what is not done.
    """
    if not isinstance(value, bool | int | float) or value not in (0, 1) or (value and role != "assistant"):
        raise RowFault(
            "unread", field, f"a {role} message has {mark} {shown(value)}; the answer is learned, whole, and no other turn"
        )
    return role == "assistant" and not value


def _with_tool_calls(fields: dict[str, Any], field: str) -> dict[str, Any]:
    """The fields without nulls inside, and calls in the form chat templates expect: ``arguments`` a mapping."""
    calls = fields.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = from_json(calls, field, "tool_calls as JSON")
    old = fields.pop("function_call", None)  # OpenAI's form before tools
    if old is not None and calls is not None:
        raise RowFault("malformed", field, "a message has both tool_calls and function_call")
    fields = without_nulls(fields)
    if old is not None:
        calls = [
            {"type": "function", "function": from_json(old, field, "function_call as JSON") if isinstance(old, str) else old}
        ]
    if not is_empty(calls):
        fields["tool_calls"] = [_call(call, field) for call in _as_list(calls)]
    return fields


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _call(call: Any, field: str) -> dict[str, Any]:
    call = from_json(call, field, "a tool call as JSON") if isinstance(call, str) else without_nulls(call)
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowFault("malformed", field, f"a tool call with the name of a function expected, found {shown(call)}")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = from_json(arguments, field, "a call's arguments as JSON") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowFault("malformed", field, f"the arguments of a call of {inner['name']} are {shown(arguments)}, not a mapping")
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else {"type": "function", "function": inner}
