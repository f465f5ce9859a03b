"""Attention over a packed row: no padding, the prompt of a pair shared by its responses.

Shape letters: T packed tokens, S segments, A query heads of this rank, G key/value heads of this rank, D head size.

A row is described by ``segments``, int64 ``[S, 4]`` on the CPU: ``(start, length, prefix_start, prefix_length)``. The tokens
``start .. start + length`` attend causally to their own segment and to the whole of the prefix, which lies in an earlier segment.
It travels through the decoder as the ``attention_mask`` argument: activation recomputation saves tensors only, and a small CPU
tensor can be read without waiting for the GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BACKENDS = ("sdpa", "flex")


class PackedAttention(torch.nn.Module):
    """A ``core_attention`` of Megatron's layer specs for packed rows. It holds no parameters.

    Args:
        config: ``kv_channels`` and ``attention_dropout`` are read.
        layer_number: Megatron passes it; every layer does the same here.
        backend: ``sdpa``: scaled_dot_product_attention, segment by segment; runs anywhere. ``flex``: FlexAttention with one
            block mask a pack, shared by all layers; trains on GPU only (it has no backward on CPU).
        softmax_scale: default ``1 / sqrt(D)``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        backend: str = "sdpa",
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert backend in BACKENDS, backend
        assert config.attention_dropout == 0.0, "dropout would make the loss depend on how the batch is cut"
        self.backend = backend
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend within the segments.

        Args:
            query: ``[T, 1, A, D]``.
            key, value: ``[T, 1, G, D]``.
            attention_mask: the ``segments`` of the row.
            attn_mask_type, attention_bias, packed_seq_params: Megatron passes them; segments say it all.

        Returns:
            ``[T, 1, A * D]``.
        """
        attend = _attend_flex if self.backend == "flex" else _attend_segments
        # [T, 1, heads, D] -> [1, heads, T, D]
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = attend(*heads_first, segments=attention_mask, scale=self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)


def _attend_segments(query: Tensor, key: Tensor, value: Tensor, *, segments: Tensor, scale: float) -> Tensor:
    """Segment by segment with scaled_dot_product_attention; all tensors ``[1, heads, T, D]``."""
    pieces = []
    grouped = query.shape[1] != key.shape[1]
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
    return torch.cat(pieces, dim=2)


@functools.lru_cache(maxsize=64)
def _prefix_causal_mask(length: int, prefix_length: int, device: torch.device) -> Tensor:
    """Bool ``[length, prefix_length + length]``: the whole prefix, and the own segment causally."""
    return torch.ones(length, prefix_length + length, dtype=torch.bool, device=device).tril(diagonal=prefix_length)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, *, segments: Tensor, scale: float) -> Tensor:
    """FlexAttention with the block mask of the row; all tensors ``[1, heads, T, D]``."""
    mask = _block_mask(segments.numpy().tobytes(), query.shape[2], query.device)
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    output = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(output, Tensor)
    return output


@functools.cache
def _compiled_flex_attention() -> Any:
    # Packs differ in length; a compilation for each would soon exceed torch's limit and fall back to dense scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=8)
def _block_mask(segments_bytes: bytes, num_tokens: int, device: torch.device) -> BlockMask:
    # Keyed by the content of the segments: all layers of a pack, and its recomputation, meet in one entry.
    segments = torch.frombuffer(bytearray(segments_bytes), dtype=torch.int64).view(-1, 4)
    lengths = segments[:, 1]
    own_start = torch.repeat_interleave(segments[:, 0], lengths).to(device)
    prefix_start = torch.repeat_interleave(segments[:, 2], lengths).to(device)
    prefix_end = torch.repeat_interleave(segments[:, 2] + segments[:, 3], lengths).to(device)

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k <= q) & (k >= own_start[q])
        prefix = (k >= prefix_start[q]) & (k < prefix_end[q])
        return own | prefix

    return create_block_mask(
        attends, B=None, H=None, Q_LEN=num_tokens, KV_LEN=num_tokens, device=str(device), _compile=device.type == "cuda"
    )
