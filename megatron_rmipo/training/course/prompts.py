"""The prompts of ``--sample-prompts``, as the model sees them at inference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rmipo.data.encoding.chat import ChatTemplate, load_template
from megatron_rmipo.data.encoding.ends import EndOfTurn
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, with_one_bos
from megatron_rmipo.data.layouts.messages import turn_of
from megatron_rmipo.data.reading.rows import RowFault, Turn
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.errors import DataError

_JSON_LINES = (".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: as its user wrote it.
        token_ids: as the model reads it, ready for an answer.
    """

    text: str
    token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    Attributes:
        prompts: in the order of the file.
        ends: ids that end an answer.
    """

    prompts: list[Prompt]
    ends: frozenset[int]


def read_prompts(path: Path, tokenizer: PreferenceTokenizer, chat: ChatForm | None, *, most_tokens: int) -> Prompts:
    """Read, render and encode the prompts of a file.

    They are rendered by the template that an export carries: that of the data, else the tokenizer's own; without either they
    are plain text.

    Args:
        path: JSON lines (``.jsonl``, ``.json``) with ``prompt`` (a text or messages) or ``messages``, or plain text, a prompt a
            line.
        tokenizer: of the model.
        chat: the form of conversations that the data carry; None where they carry none.
        most_tokens: of a prompt.

    Raises:
        DataError: the file cannot be read or holds no prompt, a line is none, or too long.
    """
    template = _template(tokenizer, chat)
    prompts = []
    for place, turns in _conversations(path):
        try:
            ids = _encoded(turns, tokenizer, template)
        except RowFault as fault:
            raise DataError(f"{place}: the chat template refuses it: {fault.message}") from None
        if not 0 < len(ids) <= most_tokens:
            raise DataError(
                f"{place}: a prompt of {len(ids)} tokens; with --sample-length it has 1 to {most_tokens}, by "
                "--tokens-per-microbatch and the model's longest sequence"
            )
        prompts.append(Prompt(_text(turns), ids))
    if not prompts:
        raise DataError(f"--sample-prompts {path}: no prompt in it")
    return Prompts(prompts, _ends(tokenizer, template, chat))


def _template(tokenizer: PreferenceTokenizer, chat: ChatForm | None) -> ChatTemplate | None:
    if chat is not None:
        return ChatTemplate("of the data", chat.template, tokenizer.spec.special_tokens, tool_source=chat.tool_template)
    return None if tokenizer.chat_template is None else load_template(None, tokenizer)


def _ends(tokenizer: PreferenceTokenizer, template: ChatTemplate | None, chat: ChatForm | None) -> frozenset[int]:
    known = [tokenizer.info.eos_token_id, *tokenizer.spec.end_token_ids]
    if chat is not None:
        known.append(chat.end_token_id)
    elif template is not None:
        known.append(EndOfTurn(tokenizer, template).token)
    return frozenset(token for token in known if token is not None)


def _encoded(turns: list[Turn], tokenizer: PreferenceTokenizer, template: ChatTemplate | None) -> list[int]:
    if template is None:
        return with_one_bos(tokenizer.encode(_text(turns)), tokenizer.info.bos_token_id)
    # It writes BOS itself where it belongs.
    return tokenizer.encode(template.render(turns, add_generation_prompt=True))


def _text(turns: list[Turn]) -> str:
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _conversations(path: Path) -> Iterator[tuple[str, list[Turn]]]:
    """(where it stands, its turns) of each prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--sample-prompts {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"--sample-prompts {path}:{number}"
            yield place, _turns(line, place) if path.suffix in _JSON_LINES else [Turn("user", line)]


def _turns(line: str, place: str) -> list[Turn]:
    expected = "a JSON object with prompt (a text or messages) or messages, the last one not the assistant's, is expected"
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    given = (row.get("prompt") or row.get("messages")) if isinstance(row, dict) else None
    if isinstance(given, str):
        return [Turn("user", given)]
    if not isinstance(given, list):
        raise DataError(f"{place}: {expected}: {line[:60]!r}")
    try:
        turns = [turn_of(message, "messages") for message in given]
    except RowFault as fault:
        raise DataError(f"{place}: {fault.message}") from None
    if turns[-1].role == "assistant":
        raise DataError(f"{place}: {expected}: {line[:60]!r}")
    return turns
