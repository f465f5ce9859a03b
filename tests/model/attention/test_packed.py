"""Packed attention against dense masked attention in float64, forward and backward, for each backend as far as it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_rmipo.model.attention import packed as attention
from megatron_rmipo.model.attention import sdpa as segment_by_segment
from megatron_rmipo.model.attention import te as varlen
from megatron_rmipo.model.attention.deal import whole_runs
from megatron_rmipo.model.attention.packed import PackedAttention, choose_backend
from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules
from megatron_rmipo.model.transformer_engine import transformer_engine_available
from tests.model.attention.rows import attention_config, dense_mask, random_segments

HEADS, GROUPS, HEAD_SIZE = 6, 2, 16
# A pair with a shared prompt (prompt 5, chosen 4, rejected 3), a plain sequence, a one-token segment, a shared prompt again.
SEGMENTS = torch.tensor([[0, 9, 0, 0], [9, 3, 0, 5], [12, 7, 0, 0], [19, 1, 0, 0], [20, 2, 0, 0], [22, 6, 20, 2]])
NUM_TOKENS = 28
FOUR_RUNS = whole_runs(np.array([[0, 4, 0, 0], [4, 2, 1, 3], [6, 1, 0, 0], [7, 3, 6, 1]]))
LONG_PREFIX = torch.tensor([[0, 9, 0, 0], [9, 8, 0, 5], [17, 11, 0, 9]])


# Rules of the scores, by what is odd about them: prompts here have 2 to 5 tokens, responses 3 to 7.
RULES = {
    "plain": ScoreRules(),
    "a window of one": ScoreRules(window=1),
    "a window shorter than prompts": ScoreRules(window=2),
    "a window longer than most": ScoreRules(window=6),
    "a window longer than all": ScoreRules(window=40),
    "capped": ScoreRules(softcap=0.7),
    "sinks": ScoreRules(sinks=True),
    "all": ScoreRules(window=3, softcap=1.3, sinks=True),
}


def inputs(dtype: torch.dtype, segments: Tensor, value_size: int = HEAD_SIZE) -> list[Tensor]:
    generator, num_tokens = torch.Generator().manual_seed(3), int(segments[-1, :2].sum())
    shapes = [(num_tokens, 1, HEADS, HEAD_SIZE), (num_tokens, 1, GROUPS, HEAD_SIZE), (num_tokens, 1, GROUPS, value_size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(leaves: list[Tensor], segments: Tensor, rules: ScoreRules, sinks: Tensor | None) -> Tensor:
    query, key, value = leaves
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / HEAD_SIZE**0.5
    if rules.softcap is not None:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    weights = scores.masked_fill(~dense_mask(segments, rules.window), float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bhqk,kbhd->qbhd", weights / total, value).flatten(2)


def module(backend: str, rules: ScoreRules = PLAIN, dtype: torch.dtype = torch.float32) -> PackedAttention:
    config = attention_config(heads=HEADS, groups=GROUPS, size=HEAD_SIZE)
    attention = PackedAttention(config, layer_number=1, backend=backend, rules=rules)
    if attention.softmax_offset is not None:
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.linspace(-1.5, 2.0, HEADS))
    return attention.to(dtype)


def compare_with_dense(
    attention: PackedAttention, segments: Tensor, dtype: torch.dtype, tolerance: float, *, value_size: int, gradients: bool
) -> None:
    leaves, reference_leaves = inputs(dtype, segments, value_size), inputs(torch.float64, segments, value_size)
    if attention.softmax_offset is not None:
        reference_leaves.append(attention.softmax_offset.detach().double().requires_grad_())
    reference = dense_attention(
        reference_leaves[:3], segments, attention.rules, reference_leaves[3] if len(reference_leaves) > 3 else None
    )
    with torch.set_grad_enabled(gradients):
        ours = attention(*leaves, segments)
    torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance)
    if not gradients:
        return
    upstream = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours.backward(upstream.to(dtype))
    reference.backward(upstream)
    if attention.softmax_offset is not None:
        leaves.append(attention.softmax_offset)
    for leaf, reference_leaf in zip(leaves, reference_leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), reference_leaf.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("on_gpu", "head_size", "backend"), [(True, 16, "flex"), (True, 15, "sdpa"), (False, 16, "sdpa")])
def test_auto_takes_flex_where_there_is_a_gpu_and_heads_are_wide_enough(
    on_gpu: bool, head_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert choose_backend("auto", head_size) == backend
    assert choose_backend("flex", head_size) == "flex"


@pytest.mark.parametrize("most_queries", [512, 2])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_match_dense_attention(name: str, most_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_by_segment, "MOST_QUERIES", most_queries)
    for segments, value_size in ((SEGMENTS, 16), (SEGMENTS, 7), (LONG_PREFIX, 16), (SEGMENTS * torch.tensor([1, 1, 0, 0]), 16)):
        attention = module("sdpa", RULES[name], torch.float64)
        compare_with_dense(attention, segments, torch.float64, 1e-10, value_size=value_size, gradients=True)


@pytest.mark.parametrize("name", RULES)
def test_flex_forward_matches_dense_attention(name: str) -> None:
    for segments, value_size in ((SEGMENTS, 16), (SEGMENTS, 32), (LONG_PREFIX, 16)):
        attention = module("flex", RULES[name])
        compare_with_dense(attention, segments, torch.float32, 1e-5, value_size=value_size, gradients=False)


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_flex_forward_matches_sdpa_on_rows_of_several_blocks(pairs: int) -> None:
    segments = random_segments(pairs, pairs=pairs, longest=150)
    generator = torch.Generator().manual_seed(pairs)
    # Keys and values as views of one tensor, as Megatron's layers give them.
    mixed = torch.randn(int(segments[-1, :2].sum()), 1, HEADS + 2 * GROUPS, HEAD_SIZE, generator=generator)
    query, key, value = mixed.split([HEADS, GROUPS, GROUPS], dim=2)
    # One layer after the other, as in a model that alternates.
    for window in (None, 37, 150, 1):
        ours, reference = (module(backend, ScoreRules(window=window)) for backend in ("flex", "sdpa"))
        expected = reference(query, key, value, segments)
        torch.testing.assert_close(ours(query, key, value, segments), expected, rtol=1e-4, atol=1e-5)


class PlainVarlen(torch.nn.Module):
    """What Transformer Engine's attention promises of THD tensors with the bottom-right causal mask, sequence by sequence."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float, rules: ScoreRules, num_shares: int = 1) -> None:
        super().__init__()
        self.softmax_scale, self.rules = softmax_scale, rules
        if rules.sinks:
            self.softmax_offset = torch.nn.Parameter(torch.zeros(HEADS))
        self.calls: list[dict[str, Any]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls.append(options)
        q_ends, kv_ends = options["cu_seqlens_q"].tolist(), options["cu_seqlens_kv"].tolist()
        assert (q_ends[-1], kv_ends[-1]) == (query.shape[0], key.shape[0])
        outputs, window = [], options["window_size"]
        assert window is None or window[1] == 0
        for number in range(len(q_ends) - 1):
            queries = query[q_ends[number] : q_ends[number + 1]]
            keys, values = (part[kv_ends[number] : kv_ends[number + 1]].repeat_interleave(3, dim=1) for part in (key, value))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.softmax_scale
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
            hidden = (
                later
                if window is None
                else later | torch.ones_like(later).tril(scores.shape[2] - scores.shape[1] - window[0] - 1)
            )
            weights = scores.masked_fill(hidden, float("-inf")).exp()
            total = weights.sum(-1, keepdim=True)
            total = total + self.softmax_offset.exp()[:, None, None] if self.rules.sinks else total
            outputs.append(torch.einsum("hqk,khd->qhd", weights / total, values))
        return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("name", [name for name, rules in RULES.items() if rules.softcap is None])
def test_te_hands_over_sequences_that_give_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", PlainVarlen)
    for segments, value_size in ((SEGMENTS, 16), (SEGMENTS, 7), (LONG_PREFIX, 16), (SEGMENTS * torch.tensor([1, 1, 0, 0]), 16)):
        te = module("te", RULES[name], torch.float64)
        compare_with_dense(te, segments, torch.float64, 1e-10, value_size=value_size, gradients=True)


@pytest.mark.parametrize("backend", ["sdpa", "te"])
def test_sinks_of_another_module_are_computed_with_and_learn(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", PlainVarlen)
    sinks = torch.nn.Parameter(torch.linspace(-1.5, 2.0, HEADS, dtype=torch.float64))
    config = attention_config(heads=HEADS, groups=GROUPS, size=HEAD_SIZE)
    borrowing = PackedAttention(config, layer_number=1, backend=backend, rules=RULES["sinks"], sinks=sinks)
    assert list(borrowing.parameters()) == [sinks]
    compare_with_dense(borrowing, SEGMENTS, torch.float64, 1e-10, value_size=HEAD_SIZE, gradients=True)


@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS * torch.tensor([1, 1, 0, 0]), LONG_PREFIX])
def test_te_is_told_the_lengths_of_sequences(segments: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", PlainVarlen)
    te = module("te")
    te(*inputs(torch.float32, segments), segments)
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
    layout = varlen.varlen_layout(FOUR_RUNS, 10)
    assert layout.cu_seqlens_q.tolist() == [0, 4, 6, 7, 10]
    assert layout.cu_seqlens_kv.tolist() == [0, 4, 9, 10, 14]
    assert layout.key_index is not None
    assert layout.key_index.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert (layout.max_seqlen_q, layout.max_seqlen_kv) == (4, 5)


def test_a_window_leaves_out_what_of_a_prefix_no_query_sees() -> None:
    layout = varlen.varlen_layout(FOUR_RUNS, 10, window=3)
    assert layout.cu_seqlens_kv.tolist() == [0, 4, 8, 9, 13]
    assert layout.key_index is not None
    assert layout.key_index.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert varlen.varlen_layout(whole_runs(SEGMENTS.numpy()), NUM_TOKENS, window=1).key_index is None


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


class Group:
    """A process group as far as a checkpoint asks for it."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("backend", ["sdpa", "te"])
def test_sinks_are_a_checkpoints_tensor_cut_over_tensor_parallel_ranks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", PlainVarlen)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    config = attention_config(heads=2 * HEADS, groups=GROUPS, size=HEAD_SIZE)
    config.tensor_model_parallel_size = 2
    groups = SimpleNamespace(tp=Group(1, 2))
    module = PackedAttention(config, 1, backend=backend, rules=ScoreRules(sinks=True), pg_collection=groups)
    assert [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()] == [("softmax_offset", (HEADS,))]
    # Megatron's layers hand on the number of the layer and of all.
    sharded = module.sharded_state_dict("core_attention.", ((0, 3, 4),), {"dp_cp_group": Group(1, 3)})
    assert list(sharded) == ["core_attention.softmax_offset"]
    tensor = sharded["core_attention.softmax_offset"]
    assert (tensor.key, tensor.global_shape) == ("core_attention.softmax_offset", (4, 2 * HEADS))
    assert (tensor.global_offset, tensor.replica_id) == ((3, HEADS), (0, 0, 1))
    assert tensor.data is module.softmax_offset
    assert module.softmax_offset.tensor_model_parallel


@pytest.mark.gpu
def test_flex_gradients_match_dense_attention_on_gpu() -> None:
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in inputs(torch.float32, SEGMENTS)]
    reference_leaves = inputs(torch.float64, SEGMENTS)
    ours = module("flex")(*leaves, SEGMENTS)
    reference = dense_attention(reference_leaves, SEGMENTS, PLAIN, None)
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
