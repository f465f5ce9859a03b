"""Attention over a packed row by scaled_dot_product_attention, segment by segment; runs anywhere.

Shape letters: L tokens of this rank, T of the row, R runs, Q queries and K keys of a piece, A query heads, G key/value heads, D
head size, E size of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules

# Of a piece where a window leaves most keys out, or scores are made outside of torch's kernels, which never hold them whole.
MOST_QUERIES = 512
# Entries of a piece's mask, where it needs one: kernels make numbers of each.
MOST_MASKED = 2**22
# Entries of a mask that is kept for pieces of the same sizes.
MOST_KEPT = 2**20
# So many masks are kept for layers and packs to come.
MASKS_KEPT = 64
_Integers = npt.NDArray[np.int64]


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: _Integers,
    scale: float,
    rules: ScoreRules = PLAIN,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a rank's tokens to those of the row that they see.

    Args:
        query: ``[L, A, D]``.
        key: ``[T, G, D]``, in the order of the row.
        value: ``[T, G, E]``.
        runs: int64 ``[R, 5]`` that the queries are, see :func:`megatron_rmipo.model.attention.deal.runs_of`.
        scale: of the scores.
        rules: what else happens to them.
        sinks: ``[A]``, where the rules have sinks.

    Returns:
        ``[L, A, E]``.
    """
    pieces = pieces_of(runs, rules.window, by_hand=rules.softcap is not None or sinks is not None)
    return torch.cat([attend_piece(query[piece.queries], key, value, piece, scale, rules, sinks) for piece in pieces])


class Piece(NamedTuple):
    """Queries that are computed together, by their places on this rank, and the keys that they see, by those in the row.

    Attributes:
        queries: of one run.
        prefix: of these the keys in the prefix of the segment.
        own: those in the segment itself, of which the last is the last query.
    """

    queries: slice
    prefix: slice
    own: slice


def pieces_of(runs: _Integers, window: int | None, *, by_hand: bool) -> Iterator[Piece]:
    """The pieces of runs; nothing that a window leaves out of sight of all queries of a piece is among its keys."""
    place = 0
    for start, length, own_start, prefix_start, prefix_length in runs.tolist():
        # Keys that the first query has before itself.
        before = prefix_length + start - own_start
        step = length
        if by_hand or (window is not None and before + length > window):
            step = MOST_QUERIES
        elif before:
            step = max(1, MOST_MASKED // (before + length))
        for first in range(0, length, step):
            end = min(first + step, length)
            # What the first query sees first, counted from where the prefix starts.
            seen = 0 if window is None else max(before + first + 1 - window, 0)
            prefix = slice(prefix_start + min(seen, prefix_length), prefix_start + prefix_length)
            yield Piece(slice(place + first, place + end), prefix, slice(own_start + max(seen - prefix_length, 0), start + end))
        place += length


def attend_piece(
    query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float, rules: ScoreRules, sinks: Tensor | None
) -> Tensor:
    """``[queries, A, E]`` of the queries of a piece, ``[queries, A, D]``; the rest as of :func:`attend_runs`."""
    keys, values = (
        torch.cat([tensor[piece.prefix], tensor[piece.own]]) if piece.prefix.start < piece.prefix.stop else tensor[piece.own]
        for tensor in (key, value)
    )
    # [tokens, heads, D] -> [heads, tokens, D]
    query, keys, values = (tensor.transpose(0, 1) for tensor in (query, keys, values))
    mask = _band_mask(query.shape[1], keys.shape[1], rules.window, query.device)
    if rules.softcap is not None or sinks is not None:
        return _attend_by_hand(query, keys, values, mask, scale, rules.softcap, sinks).transpose(0, 1)
    return _attend_by_kernel(query, keys, values, mask, scale).transpose(0, 1)


def _band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool ``[Q, K]``, the last query at the last key; None where it is plainly causal."""
    if window is not None and num_keys <= window:
        window = None
    if num_queries == num_keys and window is None:
        return None
    if window is None and num_queries * num_keys > MOST_KEPT:
        # Of a long row each piece has another.
        return _make_band_mask(num_queries, num_keys, window, device)
    return _kept_band_mask(num_queries, num_keys, window, device)


@functools.lru_cache(maxsize=MASKS_KEPT)
def _kept_band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    return _make_band_mask(num_queries, num_keys, window, device)


def _make_band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    offset = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    return mask if window is None else mask.triu(offset + 1 - window)


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[A, Q, E]`` of queries ``[A, Q, D]``, keys ``[G, K, D]`` and values ``[G, K, E]``."""
    grouped = query.shape[0] != key.shape[0]
    output = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output[0]


def _attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """As :func:`_attend_by_kernel`, for scores that torch's kernels do not make; their softmax is in fp32 at least."""
    # [A, Q, D] -> [G, A / G, Q, D]; keys and values [G, 1, K, ...]
    by_group = query.view(key.shape[0], -1, *query.shape[1:])
    scores = (by_group @ key[:, None].transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _kept_band_mask(query.shape[1], key.shape[1], None, query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        # A key of its own for each head, whose value is zero.
        sink = sinks.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    output: Tensor = (weights.to(value.dtype) @ value[:, None]).flatten(0, 1)
    return output
