"""Files of answers, in the form that each benchmark's judge reads, and read back whatever the form.

- ``alpaca``: AlpacaEval's JSON list of ``{instruction, output, generator, dataset}``.
- ``turns``: JSON lines of FastChat, ``{question_id, answer_id, model_id, choices: [{index, turns}], tstamp}``; Arena-Hard's first
  form has ``{content}`` in the place of a turn's text.
- ``messages``: JSON lines of Arena-Hard today, ``{uid, ans_id, model, messages, tstamp, metadata}``.
- ``own``: JSON lines of ``{id, generator, messages, output}``.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import DataError
from megatron_rmipo.evaluation_file import write_whole
from megatron_rmipo.generation.questions import Question, Row, read_rows


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to a question, in a file of answers.

    Attributes:
        key: names the question.
        asked: the user's turns that were answered; empty where the file does not hold them.
        turns: the answers.
        generator: the model's name.
        category: of the question, where the file has it.
    """

    key: str
    asked: tuple[str, ...]
    turns: tuple[str, ...]
    generator: str
    category: str = ""


def answers_path(folder: Path, generator: str, benchmark: str) -> Path:
    """Where the answers of a model go."""
    return folder / f"{generator}{'.json' if benchmark == 'alpaca_eval' else '.jsonl'}"


def write_answers(
    path: Path, benchmark: str, generator: str, questions: Sequence[Question], turns: Mapping[str, Sequence[str]]
) -> None:
    """Write the answers to all questions of a benchmark, in their order.

    Args:
        path: see :func:`answers_path`.
        benchmark: of :data:`megatron_rmipo.generation.questions.BENCHMARKS`.
        generator: the model's name.
        questions: what was asked.
        turns: a question's key -> its answers.

    Raises:
        ConfigError: it cannot be written.
    """
    rows = [_row(benchmark, generator, question, turns[question.key]) for question in questions]
    if benchmark == "alpaca_eval":
        text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text)


def _row(benchmark: str, generator: str, question: Question, turns: Sequence[str]) -> Row:
    row = question.row
    if benchmark == "alpaca_eval":
        alpaca = {"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": turns[0]}
        return {**alpaca, "generator": generator}
    if benchmark == "jsonl":
        messages = [{"role": turn.role, "content": turn.content} for turn in question.opening]
        messages.append({"role": "assistant", "content": turns[0]})
        return {"id": question.key, "generator": generator, "messages": messages, "output": turns[0]}
    made = time.time()
    if "uid" in row:
        asked = {"role": "user", "content": row["prompt"]}
        answered = {"role": "assistant", "content": {"answer": turns[0]}}
        model = {"uid": row["uid"], "ans_id": uuid.uuid4().hex, "model": generator}
        return {**model, "messages": [asked, answered], "tstamp": made, "metadata": {}}
    texts = [{"content": text} for text in turns] if isinstance(row["turns"][0], dict) else list(turns)
    choices = [{"index": 0, "turns": texts}]
    names = {"question_id": row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": generator}
    return {**names, "choices": choices, "tstamp": made}


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file of any of the forms.

    Raises:
        DataError: it cannot be read, or is of none of the forms.
    """
    answers: dict[str, Answer] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            answer = _read_row(row)
        except (KeyError, TypeError, IndexError, AttributeError):
            answer = None
        if answer is None or not all(isinstance(text, str) for text in (*answer.asked, *answer.turns)):
            raise DataError(
                f"{path}: row {number}: not an answer of AlpacaEval, MT-Bench, Arena-Hard or tools/generate_answers.py: it has "
                f"the fields {', '.join(row)}."
            )
        # AlpacaEval has no names, and may ask the same twice.
        key = answer.key
        while key in answers:
            key += " (again)"
        if key != answer.key and "instruction" not in row:
            raise DataError(f"{path}: row {number}: a second answer to {answer.key!r}. Keep one of them.")
        answers[key] = dataclasses.replace(answer, key=key)
    return list(answers.values())


def _read_row(row: Row) -> Answer | None:
    if "instruction" in row:
        asked = row["instruction"]
        return Answer(asked, (asked,), (row["output"],), str(row.get("generator", "")), str(row.get("dataset") or ""))
    if "choices" in row:
        turns = tuple(_text(turn) for turn in row["choices"][0]["turns"])
        return Answer(str(row["question_id"]), (), turns, str(row["model_id"]))
    if "uid" in row:
        *_, asked, answer = row["messages"]
        return Answer(row["uid"], (asked["content"],), (answer["content"]["answer"],), str(row["model"]))
    if "output" in row:
        return Answer(str(row["id"]), (row["messages"][-2]["content"],), (row["output"],), str(row["generator"]))
    return None


def _text(turn: Any) -> Any:
    return turn["content"] if isinstance(turn, dict) else turn
