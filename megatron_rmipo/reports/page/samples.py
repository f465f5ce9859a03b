"""What the policy wrote at some steps, for the prompts it was asked to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.page.tokens import cut_middle

_MOST_PROMPTS, _MOST_STEPS, _MOST_CHARACTERS = 24, 5, 1500


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, cut in its middle where it is long."""

    step: int
    text: str
    num_tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class ShownPrompt:
    """A prompt with its answers, by step.

    Attributes:
        text: as it was given.
        answers: the first, the last, and some between.
        num_left_out: answers that are not shown.
    """

    text: str
    answers: Sequence[Answer]
    num_left_out: int


def shown_samples(samples: Sequence[Record]) -> list[ShownPrompt]:
    """The records of ``samples.jsonl`` by prompt; the last one counts where a step was sampled twice, as after a resume."""
    by_prompt: dict[int, dict[int, Record]] = {}
    for record in samples:
        by_prompt.setdefault(record["prompt"], {})[record["step"]] = record
    shown = []
    for number in sorted(by_prompt)[:_MOST_PROMPTS]:
        records = [record for _, record in sorted(by_prompt[number].items())]
        count = min(_MOST_STEPS, len(records))
        places = [at * (len(records) - 1) // max(count - 1, 1) for at in range(count)]
        answers = [_answer(records[place]) for place in places]
        shown.append(ShownPrompt(cut_middle(records[0]["text"], _MOST_CHARACTERS), answers, len(records) - count))
    return shown


def _answer(record: Record) -> Answer:
    text = cut_middle(record["answer"], _MOST_CHARACTERS)
    return Answer(record["step"], text, record.get("num_tokens", 0), record.get("ended", True))
