"""What an engine is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Request:
    """An answer that is wanted.

    Attributes:
        prompt_ids: token ids of the prompt, the generation prompt included.
        temperature, top_p, max_tokens, seed: of this answer.
    """

    prompt_ids: Sequence[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        token_ids: without the token that ended it.
        ended: whether the model ended it; else it was cut at its greatest length.
    """

    token_ids: list[int]
    ended: bool

    @classmethod
    def cut(cls, token_ids: Sequence[int], end_ids: Collection[int], max_tokens: int) -> Completion:
        """The answer in what a model wrote: up to its first end, and not longer than wanted."""
        wanted = list(token_ids[:max_tokens])
        end = next((place for place, token in enumerate(wanted) if token in end_ids), None)
        return cls(wanted[:end], end is not None)


class Engine(Protocol):
    """Answers requests with a model."""

    name: str
    batch_size: int  # requests to hand over at once

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers, in order; each depends on its own request alone, up to rounding."""
