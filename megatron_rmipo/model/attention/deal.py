"""Which tokens of a row each context-parallel rank holds: blocks dealt so that all have as much attention to compute.

Shape letters: T tokens of the row, L those of one rank, T / cp, N scored tokens, S segments, R runs, cp context-parallel size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rmipo.runtime.transfers import to_device

# Of a rank, at most: few leave rows of many pairs uneven, more would cut prompts and responses into small pieces.
BLOCKS_EACH = 16
# Blocks begin at multiples of a kernel's tile where a rank's share allows it.
_TILE_TOKENS = 128
# As in flex: the rows whose backward pass, or recomputation, is to come.
_DEALS_KEPT = 32
_Integers = npt.NDArray[np.int64]


def deal(segments: _Integers, cp_size: int) -> _Integers:
    """Deal the blocks of a row to the ranks, each of which gets as many tokens, and nearly as many pairs of query and key.

    Blocks that are alike in what they cost are dealt one to each rank, the costliest first, and each time the costliest of them
    to the rank that has least so far. With one segment and two blocks each that is the known zigzag: of the first and the last
    block, the second and the last but one ...

    Args:
        segments: int64 ``[S, 4]``, see :mod:`megatron_rmipo.model.attention.packed`; they cover the row without a gap.
        cp_size: cp, which divides T.

    Returns:
        int64 ``[cp, T / cp]``, the places of each rank's tokens in the row, ascending.
    """
    num_tokens = int(segments[-1, :2].sum())
    share, rest = divmod(num_tokens, cp_size)
    assert not rest, f"{num_tokens} tokens over {cp_size} ranks"
    grain = math.gcd(share, _TILE_TOKENS)
    units = share // grain
    sizes = grain * np.diff(np.arange(min(BLOCKS_EACH, units) + 1) * units // min(BLOCKS_EACH, units))
    lengths = np.repeat(sizes, cp_size)
    starts = np.cumsum(lengths) - lengths
    areas = np.add.reduceat(_visible_keys(segments), starts)
    blocks: list[list[int]] = [[] for _ in range(cp_size)]
    loads = np.zeros(cp_size, dtype=np.int64)
    # Ranks are to have equally many tokens, so what is dealt together is equally long.
    by_cost = np.lexsort((np.arange(starts.size), -areas, -lengths)).reshape(-1, cp_size)
    for alike in sorted(by_cost.tolist(), key=lambda group: -int(areas[group].max())):
        for block, rank in zip(alike, np.argsort(loads, kind="stable").tolist(), strict=True):
            blocks[rank].append(block)
            loads[rank] += areas[block]
    places = [np.concatenate([np.arange(starts[b], starts[b] + lengths[b]) for b in sorted(own)]) for own in blocks]
    return np.stack(places)


def attention_areas(segments: _Integers, places: _Integers) -> _Integers:
    """Pairs of query and key that each rank computes, int64 ``[cp]``, of a row dealt as ``places [cp, T / cp]``."""
    areas: _Integers = _visible_keys(segments)[places].sum(axis=1)
    return areas


def _visible_keys(segments: _Integers) -> _Integers:
    """How many keys each token sees, int64 ``[T]``, windows aside."""
    start, _, _, prefix_length = np.repeat(segments, segments[:, 1], axis=0).T
    keys: _Integers = prefix_length + np.arange(start.size) - start + 1
    return keys


def whole_runs(segments: _Integers) -> _Integers:
    """The runs, as of :func:`runs_of`, of a rank that holds the whole row: its segments."""
    return segments[:, [0, 1, 0, 2, 3]]


def runs_of(segments: _Integers, places: _Integers) -> _Integers:
    """Consecutive tokens of one segment that a rank holds.

    Args:
        segments: int64 ``[S, 4]``.
        places: int64 ``[L]``, ascending.

    Returns:
        int64 ``[R, 5]``: place in the row of the first token, how many they are, where their segment starts, where its prefix
        starts, and how long that is; in the order of the rank's tokens.
    """
    owner = np.searchsorted(segments[:, 0], places, side="right") - 1
    begins = np.flatnonzero(np.r_[True, (np.diff(places) != 1) | (np.diff(owner) != 0)])
    own = segments[owner[begins]]
    return np.column_stack([places[begins], np.diff(np.r_[begins, places.size]), own[:, 0], own[:, 2], own[:, 3]])


class RowShare:
    """How a row is shared out, from one rank.

    Args:
        segments: int64 ``[S, 4]``.
        cp_size: context-parallel size.
        cp_rank: this rank's place.
        device: where the ranks' tokens are.

    Attributes:
        cp_rank: as given.
        places: int64 ``[T / cp]`` on the device, those of this rank's tokens, ascending.
        order: int64 ``[T]`` on the device: where each token of the row stands in the shares of all ranks, one after the other.
        dealt: int64 ``[T]`` on the device: the other way around.
        runs: of this rank, as :func:`runs_of` gives them.
    """

    def __init__(self, segments: _Integers, cp_size: int, cp_rank: int, device: torch.device) -> None:
        dealt = deal(segments, cp_size)
        self.cp_rank = cp_rank
        self.runs = runs_of(segments, dealt[cp_rank])
        self.places = to_device(torch.from_numpy(dealt[cp_rank]), device)
        self.dealt = to_device(torch.from_numpy(dealt.ravel()), device)
        self.order = to_device(torch.from_numpy(np.argsort(dealt.ravel(), kind="stable")), device)


class HeldTriples(NamedTuple):
    """What of a row's scored tokens a rank holds the source of.

    Attributes:
        numbers: int64 ``[n]``, which of the N.
        source: int64 ``[n]``, which of the rank's tokens predicts each.
        num_ungraded: the last so many carry no gradient.
    """

    numbers: Tensor
    source: Tensor
    num_ungraded: int


def held_triples(source: Tensor, share: RowShare, num_ungraded: int) -> HeldTriples:
    """Those of ``source [N]``, tokens of the row, of which the last ``num_ungraded`` carry no gradient, that a rank holds."""
    own = share.order[source] - share.cp_rank * share.places.numel()
    numbers = ((own >= 0) & (own < share.places.numel())).nonzero().flatten()
    ungraded = int((numbers >= source.numel() - num_ungraded).sum()) if num_ungraded else 0
    return HeldTriples(numbers, own[numbers], ungraded)


def row_share(segments: Tensor, group: torch.distributed.ProcessGroup, device: torch.device) -> RowShare:
    """The share of this rank of a context-parallel group; worked out once for all layers of a row. No communication."""
    return _row_share(segments.numpy().tobytes(), group.size(), group.rank(), device)


@functools.lru_cache(maxsize=_DEALS_KEPT)
def _row_share(segments_bytes: bytes, cp_size: int, cp_rank: int, device: torch.device) -> RowShare:
    return RowShare(np.frombuffer(segments_bytes, dtype=np.int64).reshape(-1, 4), cp_size, cp_rank, device)
