"""Pairs made of texts alone, as most tests want them."""

from __future__ import annotations

from megatron_rmipo.data.reading.rows import PreferencePair, Turn, answer


def pair_of(prompt: tuple[Turn, ...], chosen: str | None, rejected: str | None) -> PreferencePair:
    """A pair whose answers are texts and nothing else."""
    return PreferencePair(prompt, None if chosen is None else answer(chosen), None if rejected is None else answer(rejected))
