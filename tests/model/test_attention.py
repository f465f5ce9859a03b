"""Packed attention against dense masked attention in float64, forward and backward, for both backends where they run."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.model.attention import PackedAttention

HEADS, GROUPS, HEAD_SIZE = 6, 2, 8
# A pair with a shared prompt (prompt 5, chosen 4, rejected 3), a plain sequence, a one-token segment, a shared prompt again.
SEGMENTS = torch.tensor([[0, 9, 0, 0], [9, 3, 0, 5], [12, 7, 0, 0], [19, 1, 0, 0], [20, 2, 0, 0], [22, 6, 20, 2]])
NUM_TOKENS = 28


def dense_mask() -> Tensor:
    """Bool ``[T, T]``, written from the definition: own segment causally, and the prefix."""
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in SEGMENTS.tolist():
        for query in range(start, start + length):
            mask[query, start : query + 1] = True
            mask[query, prefix_start : prefix_start + prefix_length] = True
    return mask


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(NUM_TOKENS, 1, heads, HEAD_SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / HEAD_SIZE**0.5
    weights = scores.masked_fill(~dense_mask(), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def module(backend: str) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_SIZE,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return PackedAttention(config, layer_number=1, backend=backend)


def test_values_and_gradients_match_dense_attention() -> None:
    leaves, reference_leaves = inputs(torch.float64), inputs(torch.float64)
    ours = module("sdpa")(*leaves, SEGMENTS)
    reference = dense_attention(*reference_leaves)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours.backward(upstream)
    reference.backward(upstream)
    for leaf, reference_leaf in zip(leaves, reference_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, reference_leaf.grad, rtol=1e-9, atol=1e-9)


def test_flex_forward_matches_dense_attention() -> None:
    leaves = [leaf.detach() for leaf in inputs(torch.float32)]
    ours = module("flex")(*leaves, SEGMENTS)
    torch.testing.assert_close(ours, dense_attention(*leaves), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_gradients_match_dense_attention_on_gpu() -> None:
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in inputs(torch.float32)]
    reference_leaves = inputs(torch.float64)
    ours = module("flex")(*leaves, SEGMENTS)
    reference = dense_attention(*reference_leaves)
    upstream = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours.backward(upstream.float().cuda())
    reference.backward(upstream)
    torch.testing.assert_close(ours.cpu().double(), reference, rtol=5e-3, atol=5e-3)
    for leaf, reference_leaf in zip(leaves, reference_leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu().double(), reference_leaf.grad, rtol=1e-2, atol=1e-2)
