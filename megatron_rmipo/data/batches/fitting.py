"""Whether all pairs fit a pack, and how large the largest is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.sizes import Largest, check_capacity
from megatron_rmipo.data.store.collection import PairCollection


def check_pairs_fit(pairs: PairCollection, layout: BatchLayout, *, name: str = "--tokens-per-microbatch") -> None:
    """Refuse pairs, and mismatched ones, of which one fits no pack.

    They are looked at only where it does not follow from the longest sequence that all of them fit.

    Args:
        pairs: the data.
        layout: how it is laid out.
        name: what a pack's capacity is called where it was given.

    Raises:
        ConfigError: naming the largest, and the value that would work.
    """
    alone = 2 if layout.has_responses_alone else 1
    if alone * _most_tokens(pairs, layout) > layout.capacity:
        check_capacity(_pieces(pairs, layout.gradient_tokens), layout.capacity, pairs.describe, name=name)
    others = pairs.mismatched
    if others is not None and _most_tokens(others, layout) > layout.capacity:
        described = "{}, its prompt with the responses of another,".format
        pieces = _pieces(others, layout.conditional_tokens)
        check_capacity(pieces, layout.capacity, lambda index: described(pairs.describe(index)), name=name)


def largest_pair(pairs: PairCollection, layout: BatchLayout) -> int:
    """Tokens of the largest pair, as it is laid out, for which all are looked at.

    With mismatched pairs a number that is enough for all of them: that of the largest where one could be too large.
    """
    most = Largest.of(_pieces(pairs, layout.gradient_tokens), layout.capacity).size
    others = pairs.mismatched
    if others is None:
        return most
    bound = _most_tokens(others, layout)
    if bound > layout.capacity:
        bound = Largest.of(_pieces(others, layout.conditional_tokens), layout.capacity).size
    return max(most, bound)


def _most_tokens(pairs: PairCollection, layout: BatchLayout) -> int:
    """No pair takes more with its prompt, in whatever layout; nor without, for responses alone are shorter."""
    most: int = max(store.most_tokens if layout.with_rejected else store.longest for store in pairs.stores)
    return most


def _pieces(pairs: PairCollection, tokens_of: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    return ((first, tokens_of(lengths)) for first, lengths in pairs.all_lengths())
