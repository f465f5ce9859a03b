"""Rows of segments, and what attends to what in them, written from the definition."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def random_segments(seed: int, *, pairs: int, longest: int) -> Tensor:
    """Segments of pairs of random lengths: most share their prompt, some are plain sequences."""
    random = np.random.default_rng(seed)
    segments: list[list[int]] = []
    start = 0
    for _ in range(pairs):
        prompt, chosen, rejected = (int(length) for length in random.integers(1, longest, 3))
        segments.append([start, prompt + chosen, 0, 0])
        if random.random() < 0.8:
            segments.append([start + prompt + chosen, rejected, start, prompt])
            start += rejected
        start += prompt + chosen
    return torch.tensor(segments)


def dense_mask(segments: Tensor, window: int | None = None) -> Tensor:
    """Bool ``[T, T]``: own segment causally, and the prefix; of these the last ``window`` by position."""
    num_tokens = int(segments[-1, :2].sum())
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in segments.tolist():
        for query in range(start, start + length):
            seen = [*range(prefix_start, prefix_start + prefix_length), *range(start, query + 1)]
            mask[query, seen if window is None else seen[-window:]] = True
    return mask


def attention_config(*, heads: int, groups: int, size: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=size,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
