"""Two files of answers, matched question by question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_rmipo.errors import DataError
from megatron_rmipo.generation.answer_files import Answer, read_answers
from megatron_rmipo.generation.questions import Question, read_questions
from megatron_rmipo.judging.judgments import Matter
from megatron_rmipo.judging.verdicts import as_conversation

_SHOWN = 3


def read_matters(answers: Path, baseline: Path, questions: Path | None) -> tuple[list[Matter], str, str]:
    """What is to be judged, and the names of the two models.

    Args:
        answers: the model's.
        baseline: those it is compared with.
        questions: MT-Bench's or Arena-Hard's questions, where the files of answers do not hold them.

    Raises:
        DataError: the files are not of the same questions, or the questions are missing.
    """
    ours, theirs = ({answer.key: answer for answer in read_answers(path)} for path in (answers, baseline))
    missing = [key for key in ours if key not in theirs] + [key for key in theirs if key not in ours]
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        raise DataError(
            f"--answers {answers} ({len(ours)} questions), --baseline {baseline} ({len(theirs)}): {len(missing)} questions are "
            f"in one of them alone, such as {shown[:200]}. Both must answer the same questions."
        )
    known = {} if questions is None else {question.key: question for question in read_questions(questions, "arena_hard")}
    matters = [_matter(ours[key], theirs[key], known) for key in ours]
    return matters, next(iter(ours.values())).generator, next(iter(theirs.values())).generator


def _matter(answer: Answer, baseline: Answer, known: Mapping[str, Question]) -> Matter:
    question = known.get(answer.key)
    asked = answer.asked or (question.asked if question is not None else ())
    if not asked:
        remedy = (
            "Name the benchmark's question.jsonl with --questions." if not known else "--questions names another benchmark's."
        )
        raise DataError(f"question {answer.key}: what was asked is in neither file. {remedy}")
    if not len(asked) == len(answer.turns) == len(baseline.turns):
        raise DataError(
            f"question {answer.key}: {len(asked)} turns asked, {len(answer.turns)} and {len(baseline.turns)} answered. "
            "Answer all turns with both models."
        )
    text, ours = as_conversation(asked, answer.turns)
    _, theirs = as_conversation(asked, baseline.turns)
    return Matter(answer.key, text, ours, theirs, answer.category or (question.category if question is not None else ""))
