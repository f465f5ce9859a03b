"""Rows of two answers and a column that says which one won."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rmipo.data.layouts.conversations import INSTRUCTIONS, answer_of, one_prompt, prompt_given, told_twice
from megatron_rmipo.data.layouts.labels import Verdict, by_name, by_number, by_scale, by_sign, majority
from megatron_rmipo.data.reading.rows import PreferencePair, Row, RowFault, shown, value_of


@dataclasses.dataclass(frozen=True)
class WinnerLayout:
    """Where such rows keep what.

    Attributes:
        prompts: columns of the prompt, the first there is counts; may be empty where the answers are whole conversations.
        first, second: columns of the answers.
        winners: columns of the verdict; of several annotators the majority counts.
        verdict: what a value of them means, None where nothing.
        more: columns that belong to the prompt, beside it.
    """

    prompts: tuple[str, ...]
    first: str
    second: str
    winners: tuple[str, ...]
    verdict: Callable[[Any], Verdict | None]
    more: tuple[str, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        """The columns it reads."""
        return frozenset({*self.prompts, self.first, self.second, *self.winners, *self.more})

    def matches(self, row: Row) -> bool:
        """Whether a row has the answers, a prompt and the first verdict's column."""
        has_prompt = not self.prompts or any(row.get(name) is not None for name in self.prompts)
        return has_prompt and self.winners[0] in row and row.get(self.first) is not None and row.get(self.second) is not None

    def parse(self, row: Row) -> PreferencePair:
        """The winner as chosen, the other as rejected.

        Raises:
            RowFault: nobody won, or the row cannot be read.
        """
        before_first, first = answer_of(value_of(row, self.first), self.first)
        before_second, second = answer_of(value_of(row, self.second), self.second)
        prompt = one_prompt(before_first, before_second)
        if any(row.get(name) is not None for name in self.prompts):
            field, given = prompt_given(row, self.prompts)
            prompt = told_twice(given, prompt, field)
        if not prompt:
            raise RowFault(
                "missing_field", (*self.prompts, self.first)[0], "no prompt column, and no messages before the answers"
            )
        verdict = self._verdict(row)
        if verdict == "tie":
            said = ", ".join(f"{name} is {shown(row.get(name))}" for name in self.winners)
            raise RowFault("tied", self.winners[0], f"neither answer won: {said}")
        return PreferencePair(prompt, *((first, second) if verdict == "first" else (second, first)))

    def _verdict(self, row: Row) -> Verdict:
        given = [name for name in self.winners if row.get(name) is not None]
        verdicts: list[Verdict] = []
        for name in given:
            verdict = self.verdict(row[name])
            if verdict is None:
                raise RowFault("bad_label", name, f"{shown(row[name])} does not say which answer won; see --winner-values")
            verdicts.append(verdict)
        if not verdicts:
            value_of(row, self.winners[0])
        return majority(verdicts)


WHICH_WON: Mapping[str, WinnerLayout] = {
    "alpaca_eval": WinnerLayout(("instruction",), "output_1", "output_2", ("preference",), by_scale, ("input",)),
    "llmbar": WinnerLayout(("input",), "output_1", "output_2", ("label",), by_number),
    "pandalm": WinnerLayout(
        ("instruction",), "response1", "response2", ("annotator1", "annotator2", "annotator3"), by_number, ("input",)
    ),
    "helpsteer2": WinnerLayout(("prompt",), "response_1", "response_2", ("preference_strength",), by_sign),
    "helpsteer3": WinnerLayout(("context",), "response1", "response2", ("overall_preference",), by_sign),
    "arena": WinnerLayout((), "conversation_a", "conversation_b", ("winner",), by_name),
    "which_won": WinnerLayout(("prompt", "context", *INSTRUCTIONS), "first", "second", ("winner",), by_name, ("history",)),
}
