"""Attention over a packed row by scaled_dot_product_attention, segment by segment; runs anywhere.

Shape letters: T packed tokens, S segments, A query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_segments(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float) -> Tensor:
    """Attention within the segments of a row.

    Args:
        query: ``[T, A, D]``.
        key, value: ``[T, G, D]``.
        segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
        scale: of the scores.

    Returns:
        ``[T, A, D]``.
    """
    pieces = []
    grouped = query.shape[1] != key.shape[1]
    # [T, heads, D] -> [1, heads, T, D]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    for start, length, prefix_start, prefix_length in segments.tolist():
        own = slice(start, start + length)
        if prefix_length == 0:
            keys, values, mask = key[:, :, own], value[:, :, own], None
        else:
            prefix = slice(prefix_start, prefix_start + prefix_length)
            keys = torch.cat([key[:, :, prefix], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, prefix], value[:, :, own]], dim=2)
            mask = _prefix_causal_mask(length, prefix_length, query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, own], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _prefix_causal_mask(length: int, prefix_length: int, device: torch.device) -> Tensor:
    """Bool ``[length, prefix_length + length]``: the whole prefix, and the own segment causally."""
    return torch.ones(length, prefix_length + length, dtype=torch.bool, device=device).tril(diagonal=prefix_length)
