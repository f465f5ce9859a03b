from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_rmipo.data.encoding.shorten import shorten_prompt
from megatron_rmipo.data.reading.rows import Turn


class CountingEncoder:
    """A turn costs 3 tokens and one for every 4 characters begun; ids are the characters' positions in a serial text."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, turns: Sequence[Turn]) -> list[int]:
        self.calls += 1
        return [len(turn.role) for turn in turns for _ in range(3 + -(-len(turn.content) // 4))]


def turns(*lengths: int, system: int = 0) -> tuple[Turn, ...]:
    roles = ["user", "assistant"] * len(lengths)
    head = (Turn("system", "s" * system),) if system else ()
    return (*head, *(Turn(role, "x" * length) for role, length in zip(roles, lengths, strict=False)))


@pytest.mark.parametrize("room", range(16, 60, 7))
@pytest.mark.parametrize("system", [0, 8])
def test_as_many_last_turns_as_fit(room: int, system: int) -> None:
    prompt = turns(40, 8, 40, 8, 12, 8, 20, system=system)
    encode = CountingEncoder()
    ids = shorten_prompt(prompt, room, encode)
    rest = prompt[bool(system) :]
    fitting = [encode((*prompt[: bool(system)], *rest[start:])) for start in range(2, 8, 2)]
    assert ids == next(candidate for candidate in fitting if len(candidate) <= room)


@pytest.mark.parametrize("length", [41, 400, 40_000])
def test_a_single_turn_fills_the_room_in_few_steps(length: int) -> None:
    encode = CountingEncoder()
    ids = shorten_prompt(turns(length), 13, encode)
    assert ids is not None
    assert 11 <= len(ids) <= 13
    assert encode.calls <= 13


def test_text_that_costs_unevenly_is_cut_by_bisection() -> None:
    def encode(prompt: Sequence[Turn]) -> list[int]:
        return [0] * sum(3 + sum(10 if char == "y" else 0 for char in turn.content) for turn in prompt)

    ids = shorten_prompt((Turn("user", "y" * 30 + "x" * 970),), 250, encode)
    assert ids is not None
    assert 200 <= len(ids) <= 250


def test_no_room_at_all() -> None:
    assert shorten_prompt(turns(40, system=8), 5, CountingEncoder()) is None
    assert shorten_prompt(turns(1), 3, CountingEncoder()) is None
