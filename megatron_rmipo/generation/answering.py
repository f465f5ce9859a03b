"""All questions of a benchmark, answered: batch by batch, turn by turn, each answer kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rmipo.command import progress_bar
from megatron_rmipo.data.reading.rows import Turn, answer
from megatron_rmipo.errors import DataError
from megatron_rmipo.evaluation_file import Cell, EvaluationTable
from megatron_rmipo.generation.kept_records import KeptRecords
from megatron_rmipo.generation.prompts import Prompts
from megatron_rmipo.generation.questions import Question
from megatron_rmipo.generation.requests import Completion, Engine, Request
from megatron_rmipo.generation.sampling import Sampling


def check_prompts_fit(questions: Sequence[Question], prompts: Prompts) -> None:
    """Refuse a first question that leaves the model no room for an answer.

    Raises:
        DataError: naming it.
    """
    for question in questions:
        ids = prompts.encode(question.opening, f"question {question.key}")
        if prompts.longest is not None and len(ids) >= prompts.longest:
            raise DataError(
                f"question {question.key}: {len(ids)} tokens, and the model takes {prompts.longest}. Leave it out of --prompts."
            )


def answer_questions(
    questions: Sequence[Question], prompts: Prompts, engine: Engine, sampling: Sampling, kept: KeptRecords
) -> None:
    """Answer those questions that have no kept answer, and keep theirs.

    Args:
        questions: all of them.
        prompts: of the model.
        engine: computes the answers.
        sampling: how.
        kept: a question's key -> ``turns``, ``num_tokens`` and ``ended``, a value a turn each.
    """
    # Of like lengths together, the longest first: where memory is short, that shows at once.
    missing = [question for question in questions if question.key not in kept.records]
    missing.sort(key=lambda question: sum(map(len, question.asked)), reverse=True)
    bar = progress_bar("answers", len(questions), " answers", shown=True, num_done=len(questions) - len(missing))
    with bar:
        for start in range(0, len(missing), engine.batch_size):
            batch = missing[start : start + engine.batch_size]
            for question, turns in zip(batch, _answer(batch, prompts, engine, sampling), strict=True):
                kept.add(question.key, _record(turns))
                bar.update()


@dataclasses.dataclass
class _Conversation:
    question: Question
    turns: list[Turn]
    answers: list[tuple[str, Completion]] = dataclasses.field(default_factory=list)


def _answer(
    batch: Sequence[Question], prompts: Prompts, engine: Engine, sampling: Sampling
) -> list[list[tuple[str, Completion]]]:
    """Text and tokens of each answer to each question; a later turn sees the answers before it."""
    conversations = [_Conversation(question, list(question.opening)) for question in batch]
    for turn in range(max(len(question.asked) for question in batch)):
        asked = [conversation for conversation in conversations if turn < len(conversation.question.asked)]
        encoded = [prompts.encode(one.turns, f"question {one.question.key}") for one in asked]
        rooms = [sampling.max_tokens if prompts.longest is None else prompts.longest - len(ids) for ids in encoded]
        requests = {
            place: Request(
                ids,
                sampling.temperature_of(one.question),
                sampling.top_p,
                min(sampling.max_tokens, room),
                sampling.seed_of(one.question, turn),
            )
            for place, (one, ids, room) in enumerate(zip(asked, encoded, rooms, strict=True))
            if room > 0
        }
        done = dict(zip(requests, engine.generate(list(requests.values())) if requests else [], strict=True))
        for place, one in enumerate(asked):
            # A conversation that has filled the model's context has no room for a further answer.
            completion = done.get(place, Completion([], ended=False))
            text = prompts.decode(encoded[place], completion.token_ids)
            one.answers.append((text, completion))
            further = one.question.further[turn : turn + 1]
            one.turns += [answer(text), *(Turn("user", asked_next) for asked_next in further)]
    return [one.answers for one in conversations]


def _record(answers: Sequence[tuple[str, Completion]]) -> dict[str, Any]:
    return {
        "turns": [text for text, _ in answers],
        "num_tokens": [len(completion.token_ids) for _, completion in answers],
        "ended": [completion.ended for _, completion in answers],
    }


def length_table(title: str, questions: Sequence[Question], records: Mapping[str, Mapping[str, Any]]) -> EvaluationTable:
    """Lengths of the answers, in all and by category.

    Args:
        title: of the table.
        questions: all of them.
        records: what :func:`answer_questions` kept.
    """
    categories = sorted({question.category for question in questions})
    groups = {"all": list(questions)}
    if len(categories) > 1:
        groups |= {name or "none": [question for question in questions if question.category == name] for name in categories}
    rows: list[list[Cell]] = []
    for name, members in groups.items():
        of_group = [records[question.key] for question in members]
        tokens = [count for record in of_group for count in record["num_tokens"]]
        characters = [len(text) for record in of_group for text in record["turns"]]
        ended = [end for record in of_group for end in record["ended"]]
        lengths = (statistics.fmean(tokens), max(tokens), statistics.fmean(characters))
        rows.append([name, len(members), len(tokens), *(round(value, 1) for value in lengths), statistics.fmean(ended)])
    columns = ["category", "questions", "answers", "mean tokens", "most tokens", "mean characters", "share ended"]
    note = "The share that ended is of answers that the model ended itself; the others were cut at --max-tokens."
    return EvaluationTable(title, columns, rows, note)
