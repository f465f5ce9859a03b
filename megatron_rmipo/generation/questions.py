"""Questions of a benchmark, in the form that its own file has, or of one's own.

- AlpacaEval 2: a JSON list of ``{instruction, dataset}``.
- MT-Bench: ``question.jsonl`` of ``{question_id, category, turns: [text, text]}``.
- Arena-Hard: ``question.jsonl`` of ``{question_id, category, turns: [{content}]}``, or of ``{uid, category, prompt}`` as its
  repository has both versions today.
- one's own: JSON lines of ``{prompt}`` or ``{messages}``, with an ``id`` and a ``category`` where there are any.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.data.reading.rows import Turn
from megatron_rmipo.errors import DataError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        key: names it within its file, and in files of answers.
        opening: the conversation up to the first question, which is the user's.
        further: what the user asks afterwards, an answer before each.
        category: of the benchmark; may be empty.
        row: as it stands in the file.
    """

    key: str
    opening: tuple[Turn, ...]
    further: tuple[str, ...]
    category: str
    row: Row

    @property
    def asked(self) -> tuple[str, ...]:
        """The user's turns that are answered."""
        return (self.opening[-1].content, *self.further)


class _FormError(Exception):
    """A row that is not of the form its benchmark has; the message says what is missing."""


def read_questions(path: Path, benchmark: str) -> list[Question]:
    """The questions of a file.

    Args:
        path: the file.
        benchmark: one of :data:`BENCHMARKS`.

    Raises:
        DataError: it cannot be read, or a row is not of the benchmark's form.
    """
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            question = _READERS[benchmark](row, number)
        except _FormError as error:
            raise DataError(
                f"{path}: row {number}: {error}. --benchmark {benchmark} reads {_FORMS[benchmark]}; for prompts of your own use "
                f"--benchmark jsonl ({_FORMS['jsonl']})."
            ) from None
        if question.key in questions:
            raise DataError(f"{path}: row {number}: a second row has the name {question.key!r}. Give each its own.")
        questions[question.key] = question
    return list(questions.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file: one a line, or all in a JSON list.

    Raises:
        DataError: the file cannot be read, is no JSON, or holds something else than objects.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}).") from None
    if text.lstrip().startswith("["):
        rows = _parse(text, f"{path}")
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file is empty.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: an object is expected, found {type(row).__name__}.")
    return list(rows)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}). Fetch or make the file again.") from None


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _FormError(f"no text in {field!r}" if field in row else f"no field {field!r}")
    return value


def _turns(row: Row) -> list[str]:
    turns = row.get("turns")
    texts: list[Any] = (
        [turn.get("content") if isinstance(turn, dict) else turn for turn in turns] if isinstance(turns, list) else []
    )
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise _FormError("no list of texts in 'turns'" if "turns" in row else "no field 'turns'")
    return texts


def _question(key: object, turns: Sequence[str], row: Row) -> Question:
    return Question(str(key), (Turn("user", turns[0]),), tuple(turns[1:]), str(row.get("category") or ""), row)


def _alpaca_eval(row: Row, number: int) -> Question:
    question = _question(number, [_text(row, "instruction")], row)
    return dataclasses.replace(question, category=str(row.get("dataset") or ""))


def _mt_bench(row: Row, number: int) -> Question:
    if "question_id" not in row:
        raise _FormError("no field 'question_id'")
    return _question(row["question_id"], _turns(row), row)


def _arena_hard(row: Row, number: int) -> Question:
    return _question(_text(row, "uid"), [_text(row, "prompt")], row) if "uid" in row else _mt_bench(row, number)


def _arena_hard_v2(row: Row, number: int) -> Question:
    return _question(_text(row, "uid"), [_text(row, "prompt")], row)


def _own(row: Row, number: int) -> Question:
    key = row.get("id", number)
    if "messages" not in row:
        return _question(key, [_text(row, "prompt")], row)
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise _FormError("'messages' is no list of objects with a 'role' and a text as 'content'")
    if not messages or messages[-1]["role"] != "user":
        raise _FormError("the last of 'messages' is not the user's")
    opening = tuple(Turn(message["role"], message["content"]) for message in messages)
    return Question(str(key), opening, (), str(row.get("category") or ""), row)


_READERS: Mapping[str, Callable[[Row, int], Question]] = {
    "alpaca_eval": _alpaca_eval,
    "mt_bench": _mt_bench,
    "arena_hard": _arena_hard,
    "arena_hard_v2": _arena_hard_v2,
    "jsonl": _own,
}
_FORMS = {
    "alpaca_eval": "a JSON list of objects with instruction and dataset",
    "mt_bench": "its question.jsonl: question_id, category, turns",
    "arena_hard": "its question.jsonl: question_id and turns, or uid and prompt",
    "arena_hard_v2": "its question.jsonl: uid and prompt",
    "jsonl": "JSON lines with prompt or messages",
}
BENCHMARKS = tuple(_READERS)
