"""Attention over a packed row by scaled_dot_product_attention, segment by segment; runs anywhere.

Shape letters: T packed tokens, S segments, L queries and K keys of a piece, A query heads, G key/value heads, D head size, E size
of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules

# Of a piece where a window leaves most keys out, or scores are made outside of torch's kernels, which never hold them whole.
_MOST_QUERIES = 512


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    scale: float,
    rules: ScoreRules = PLAIN,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within the segments of a row.

    Args:
        query: ``[T, A, D]``.
        key: ``[T, G, D]``.
        value: ``[T, G, E]``.
        segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
        scale: of the scores.
        rules: what else happens to them.
        sinks: ``[A]``, where the rules have sinks.

    Returns:
        ``[T, A, E]``.
    """
    outputs = []
    # [T, heads, D] -> [heads, T, D]
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    by_hand = rules.softcap is not None or sinks is not None
    for queries, prefix, own in _pieces(segments, rules.window, by_hand):
        keys, values = (_concatenated(tensor[:, prefix], tensor[:, own]) for tensor in (key, value))
        piece = query[:, queries]
        mask = _band_mask(piece.shape[1], keys.shape[1], rules.window, query.device)
        if by_hand:
            outputs.append(_attend_by_hand(piece, keys, values, mask, scale, rules.softcap, sinks))
        else:
            outputs.append(_attend_by_kernel(piece, keys, values, mask, scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _pieces(segments: Tensor, window: int | None, by_hand: bool) -> Iterator[tuple[slice, slice, slice]]:
    """(queries, keys of the prefix, keys of the own segment) of each piece.

    Its last query is its last key, and nothing that a window leaves out of sight of all its queries is among the keys.
    """
    for start, length, prefix_start, prefix_length in segments.tolist():
        whole = not by_hand and (window is None or prefix_length + length <= window)
        for first in range(0, length, length if whole else _MOST_QUERIES):
            end = length if whole else min(first + _MOST_QUERIES, length)
            # What the first query sees first, counted from where the prefix starts.
            seen = 0 if window is None else max(prefix_length + first + 1 - window, 0)
            prefix = slice(prefix_start + min(seen, prefix_length), prefix_start + prefix_length)
            yield slice(start + first, start + end), prefix, slice(start + max(seen - prefix_length, 0), start + end)


def _concatenated(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix, own], dim=1) if prefix.shape[1] else own


def _band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool ``[L, K]``, the last query at the last key; None where it is plainly causal."""
    if window is not None and num_keys <= window:
        window = None
    if num_queries == num_keys and window is None:
        return None
    return _make_band_mask(num_queries, num_keys, window, device)


@functools.lru_cache(maxsize=64)
def _make_band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    offset = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    return mask if window is None else mask.triu(offset + 1 - window)


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[A, L, E]`` of queries ``[A, L, D]``, keys ``[G, K, D]`` and values ``[G, K, E]``."""
    grouped = query.shape[0] != key.shape[0]
    output = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output[0]


def _attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """As :func:`_attend_by_kernel`, for scores that torch's kernels do not make; their softmax is in fp32 at least."""
    # [A, L, D] -> [G, A / G, L, D]; keys and values [G, 1, K, ...]
    by_group = query.view(key.shape[0], -1, *query.shape[1:])
    scores = (by_group @ key[:, None].transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _make_band_mask(query.shape[1], key.shape[1], None, query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        # A key of its own for each head, whose value is zero.
        sink = sinks.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    output: Tensor = (weights.to(value.dtype) @ value[:, None]).flatten(0, 1)
    return output
