"""Packed attention against dense masked attention in float64, forward and backward, for each backend as far as it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_rmipo.model.attention import packed as attention
from megatron_rmipo.model.attention import te as varlen
from megatron_rmipo.model.attention.packed import PackedAttention, choose_backend
from megatron_rmipo.model.transformer_engine import transformer_engine_available
from tests.model.attention.rows import attention_config, dense_mask, random_segments

HEADS, GROUPS, HEAD_SIZE = 6, 2, 16
# A pair with a shared prompt (prompt 5, chosen 4, rejected 3), a plain sequence, a one-token segment, a shared prompt again.
SEGMENTS = torch.tensor([[0, 9, 0, 0], [9, 3, 0, 5], [12, 7, 0, 0], [19, 1, 0, 0], [20, 2, 0, 0], [22, 6, 20, 2]])
NUM_TOKENS = 28


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(NUM_TOKENS, 1, heads, HEAD_SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / HEAD_SIZE**0.5
    weights = scores.masked_fill(~dense_mask(SEGMENTS), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def module(backend: str) -> PackedAttention:
    return PackedAttention(attention_config(heads=HEADS, groups=GROUPS, size=HEAD_SIZE), layer_number=1, backend=backend)


@pytest.mark.parametrize(("on_gpu", "head_size", "backend"), [(True, 16, "flex"), (True, 15, "sdpa"), (False, 16, "sdpa")])
def test_auto_takes_flex_where_there_is_a_gpu_and_heads_are_wide_enough(
    on_gpu: bool, head_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert choose_backend("auto", head_size) == backend
    assert choose_backend("flex", head_size) == "flex"


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


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_flex_forward_matches_sdpa_on_rows_of_several_blocks(pairs: int) -> None:
    segments = random_segments(pairs, pairs=pairs, longest=150)
    generator = torch.Generator().manual_seed(pairs)
    # Keys and values as views of one tensor, as Megatron's layers give them.
    mixed = torch.randn(int(segments[-1, :2].sum()), 1, HEADS + 2 * GROUPS, HEAD_SIZE, generator=generator)
    query, key, value = mixed.split([HEADS, GROUPS, GROUPS], dim=2)
    expected = module("sdpa")(query, key, value, segments)
    torch.testing.assert_close(module("flex")(query, key, value, segments), expected, rtol=1e-4, atol=1e-5)


class PlainVarlen(torch.nn.Module):
    """What Transformer Engine's attention promises of THD tensors with the bottom-right causal mask, sequence by sequence."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.calls: list[dict[str, Any]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls.append(options)
        q_ends, kv_ends = options["cu_seqlens_q"].tolist(), options["cu_seqlens_kv"].tolist()
        assert (q_ends[-1], kv_ends[-1]) == (query.shape[0], key.shape[0])
        outputs = []
        for number in range(len(q_ends) - 1):
            queries = query[q_ends[number] : q_ends[number + 1]]
            keys, values = (part[kv_ends[number] : kv_ends[number + 1]].repeat_interleave(3, dim=1) for part in (key, value))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.softmax_scale
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), values))
        return torch.cat(outputs).flatten(1)


LONG_PREFIX = torch.tensor([[0, 9, 0, 0], [9, 8, 0, 5], [17, 11, 0, 9]])


@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS * torch.tensor([1, 1, 0, 0]), LONG_PREFIX])
def test_te_hands_over_sequences_that_give_the_same_attention(segments: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", PlainVarlen)
    te, sdpa = module("te"), module("sdpa")
    leaves, reference_leaves = inputs(torch.float64), inputs(torch.float64)
    ours, reference = te(*leaves, segments), sdpa(*reference_leaves, segments)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours.backward(upstream)
    reference.backward(upstream)
    for leaf, reference_leaf in zip(leaves, reference_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, reference_leaf.grad, rtol=1e-9, atol=1e-9)
    assert isinstance(te.kernel, PlainVarlen)
    (options,) = te.kernel.calls
    assert {options["cu_seqlens_q"].dtype, options["cu_seqlens_kv"].dtype} == {torch.int32}
    assert (options["qkv_format"], options["attn_mask_type"], options["pad_between_seqs"]) == (
        "thd",
        "padding_causal_bottom_right",
        False,
    )
    assert options["max_seqlen_q"] == segments[:, 1].max()
    assert options["max_seqlen_kv"] == (segments[:, 1] + segments[:, 3]).max()
    assert options["cu_seqlens_kv"][-1] == NUM_TOKENS + segments[:, 3].sum()


def test_the_layout_of_sequences_repeats_each_prefix_before_its_segment() -> None:
    layout = varlen.varlen_layout(torch.tensor([[0, 4, 0, 0], [4, 2, 1, 3], [6, 1, 0, 0], [7, 3, 6, 1]]).numpy())
    assert layout.cu_seqlens_q.tolist() == [0, 4, 6, 7, 10]
    assert layout.cu_seqlens_kv.tolist() == [0, 4, 9, 10, 14]
    assert layout.key_index is not None
    assert layout.key_index.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert (layout.max_seqlen_q, layout.max_seqlen_kv) == (4, 5)


def test_no_backend_leaves_anything_in_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stateful(PlainVarlen):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(3)

    monkeypatch.setattr(attention, "build_kernel", Stateful)
    assert list(module("te").state_dict()) == ["kernel._extra_state"]
    assert [module(name).sharded_state_dict(prefix="x.", sharded_offsets=(), metadata=None) for name in ("te", "flex")] == [
        {},
        {},
    ]


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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "te"])
def test_gradients_match_sdpa_on_gpu_in_bf16_whatever_the_length(backend: str) -> None:
    if backend == "te" and not transformer_engine_available():
        pytest.skip("needs Transformer Engine")
    config = attention_config(heads=8, groups=2, size=64)
    ours, reference = (PackedAttention(config, layer_number=1, backend=name) for name in (backend, "sdpa"))
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(5)
    for seed, pairs in enumerate((6, 3, 9, 1, 12)):
        segments = random_segments(seed, pairs=pairs, longest=150)
        mixed = torch.randn(int(segments[-1, :2].sum()), 1, 12, 64, generator=generator).bfloat16()
        upstream = torch.randn(mixed.shape[0], 1, 512, generator=generator).bfloat16()
        leaf, reference_leaf = mixed.cuda().requires_grad_(), mixed.double().requires_grad_()
        for one, tokens, gradient in ((ours, leaf, upstream.cuda()), (reference, reference_leaf, upstream.double())):
            one(*tokens.split([8, 2, 2], dim=2), segments).backward(gradient)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu().double(), reference_leaf.grad, rtol=5e-2, atol=5e-2)
    assert counters["stats"]["unique_graphs"] == (1 if backend == "flex" else 0)
