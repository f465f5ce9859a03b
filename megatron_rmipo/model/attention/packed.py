"""Attention over a packed row: no padding, the prompt of a pair shared by its responses.

Shape letters: T packed tokens, S segments, A query heads of this rank, G key/value heads of this rank, D head size.

A row is described by ``segments``, int64 ``[S, 4]`` on the CPU: ``(start, length, prefix_start, prefix_length)``. The tokens
``start .. start + length`` attend causally to their own segment and to the whole of the prefix, which lies in an earlier segment.
It travels through the decoder as the ``attention_mask`` argument: activation recomputation saves tensors only, and a small CPU
tensor can be read without waiting for the GPU.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.model.attention.flex import BLOCK_TOKENS, LEAST_HEAD_SIZE, attend_flex
from megatron_rmipo.model.attention.sdpa import attend_segments
from megatron_rmipo.model.attention.te import attend_varlen, build_kernel

# Backend -> rows that are a multiple of this long need no padded copies inside the attention.
BACKENDS = {"sdpa": 1, "flex": BLOCK_TOKENS, "te": 1}


def choose_backend(name: str, head_size: int) -> str:
    """``auto`` made out: ``flex`` with CUDA and heads that it takes, ``sdpa`` elsewhere; any other backend is itself."""
    if name == "auto":
        name = "flex" if torch.cuda.is_available() and head_size >= LEAST_HEAD_SIZE else "sdpa"
    assert name in BACKENDS, name
    return name


@dataclasses.dataclass(frozen=True)
class ScoreRules:
    """What happens to the scores of a layer before their softmax.

    Attributes:
        window: how many tokens, by position and itself among them, a token sees; None for all before it.
        softcap: scores s become ``cap * tanh(s / cap)``; None leaves them.
        sinks: each head has a learned score that takes its part of the softmax and gives nothing.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class PackedAttention(torch.nn.Module):
    """A ``core_attention`` of Megatron's layer specs for packed rows. It holds no parameters.

    Args:
        config: ``kv_channels`` and ``attention_dropout`` are read.
        layer_number: Megatron passes it.
        backend: ``sdpa``: scaled_dot_product_attention, segment by segment; runs anywhere. ``flex``: FlexAttention with one
            block mask a pack, shared by all layers; trains on GPU only (it has no backward on CPU). ``te``: Transformer Engine,
            each segment a sequence, the keys of a shared prompt repeated for it; needs a GPU.
        rules: what happens to the scores.
        softmax_scale: default ``1 / sqrt(D)``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        backend: str = "sdpa",
        rules: ScoreRules = ScoreRules(),
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert backend in BACKENDS, backend
        assert config.attention_dropout == 0.0, "dropout would make the loss depend on how the batch is cut"
        self.backend = backend
        self.rules = rules
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels or 1)
        self.kernel = build_kernel(config, layer_number, self.softmax_scale) if backend == "te" else None

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
        # [T, 1, heads, D] -> [T, heads, D]
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.backend == "flex":
            context = attend_flex(query, key, value, attention_mask, self.softmax_scale)
        elif self.kernel is not None:
            context = attend_varlen(self.kernel, query, key, value, attention_mask)
        else:
            context = attend_segments(query, key, value, attention_mask, self.softmax_scale)
        return context.flatten(1)[:, None]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing, whatever the backend: a checkpoint of one is a checkpoint of all."""
        return {}
