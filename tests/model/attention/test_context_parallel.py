"""Attention of a row whose tokens lie on several ranks against that of one rank with all of them, forward and backward."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from megatron_rmipo.model.attention import flex as block_masks
from megatron_rmipo.model.attention import packed
from megatron_rmipo.model.attention import sdpa as segment_by_segment
from megatron_rmipo.model.attention.context_parallel import join_scores
from megatron_rmipo.model.attention.deal import row_share
from megatron_rmipo.model.attention.packed import PackedAttention
from megatron_rmipo.model.attention.scores import ScoreRules
from tests.harness import run_distributed
from tests.model.attention.rows import attention_config, random_segments
from tests.model.attention.test_packed import PlainVarlen

HEADS, GROUPS, HEAD_SIZE = 6, 2, 16
RULES = {
    "plain": ScoreRules(),
    "a window": ScoreRules(window=7),
    "a window longer than all": ScoreRules(window=400),
    "capped": ScoreRules(softcap=0.7),
    "sinks": ScoreRules(sinks=True),
    "all": ScoreRules(window=30, softcap=1.3, sinks=True),
}


def filled_up(segments: Tensor, multiple: int) -> Tensor:
    end = int(segments[-1, :2].sum())
    return torch.cat([segments, torch.tensor([[end, -end % multiple, 0, 0]])]) if end % multiple else segments


def module(backend: str, rules: ScoreRules, dtype: torch.dtype, groups: Any = None, kind: str | None = None) -> PackedAttention:
    config = attention_config(heads=HEADS, groups=GROUPS, size=HEAD_SIZE)
    attention = PackedAttention(config, 1, backend=backend, rules=rules, pg_collection=groups, cp_comm_type=kind).to(dtype)
    if attention.softmax_offset is not None:
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.linspace(-1.5, 2.0, HEADS))
    return attention


def compare(backend: str, rules: ScoreRules, kind: str, dtype: torch.dtype, *, gradients: bool, value_size: int = 16) -> None:
    """On each rank: its tokens' output and gradients, and the sum over ranks of the sinks' gradients."""
    group = dist.group.WORLD
    assert group is not None
    for seed, pairs in ((1, 1), (2, 4)):
        segments = filled_up(random_segments(seed, pairs=pairs, longest=110), 2 * group.size())
        generator, num_tokens = torch.Generator().manual_seed(seed), int(segments[-1, :2].sum())
        shapes = [(num_tokens, 1, heads, size) for heads, size in ((HEADS, 16), (GROUPS, 16), (GROUPS, value_size))]
        whole = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
        upstream = torch.randn(num_tokens, 1, HEADS * value_size, generator=generator, dtype=torch.float64).to(dtype)
        places = row_share(segments, group, torch.device("cpu")).places
        own = [tensor.detach()[places].requires_grad_() for tensor in whole]
        ours = module(backend, rules, dtype, SimpleNamespace(cp=group), kind)
        one = module("sdpa", rules, dtype)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        with torch.set_grad_enabled(gradients):
            found, expected = ours(*own, segments), one(*whole, segments)
        torch.testing.assert_close(found, expected[places], rtol=tolerance, atol=tolerance)
        if not gradients:
            continue
        found.backward(upstream[places])
        expected.backward(upstream)
        for tensor, reference in zip(own, whole, strict=True):
            assert tensor.grad is not None
            assert reference.grad is not None
            torch.testing.assert_close(tensor.grad, reference.grad[places], rtol=10 * tolerance, atol=10 * tolerance)
        if ours.softmax_offset is not None:
            assert one.softmax_offset is not None
            total = ours.softmax_offset.grad
            assert total is not None
            dist.all_reduce(total)
            torch.testing.assert_close(total, one.softmax_offset.grad, rtol=10 * tolerance, atol=10 * tolerance)


def all_of_them(kinds: list[str]) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    packed.build_kernel = PlainVarlen  # type: ignore[assignment]
    for kind in kinds:
        for rules in RULES.values():
            compare("sdpa", rules, kind, torch.float64, gradients=True)
            compare("flex", rules, kind, torch.float32, gradients=False)
        compare("sdpa", RULES["plain"], kind, torch.float64, gradients=True, value_size=7)
        for name in ("plain", "a window", "a window longer than all"):
            compare("te", RULES[name], kind, torch.float64, gradients=True)
        segment_by_segment.MOST_QUERIES, segment_by_segment.MOST_MASKED = 3, 50
        compare("sdpa", RULES["all"], kind, torch.float64, gradients=True)
        compare("sdpa", RULES["plain"], kind, torch.float64, gradients=True)
        segment_by_segment.MOST_QUERIES, segment_by_segment.MOST_MASKED = 512, 2**22
    # FlexAttention's reference implementation, whose backward pass torch does not offer on the CPU but has.
    torch_flex._validate_device = lambda *args: None
    compiled = torch.compile(block_masks._attend_blocks, backend="aot_eager", fullgraph=True, dynamic=False)
    block_masks._compiled = lambda device_type: compiled  # type: ignore[assignment]
    if world_size == 2:
        compare("flex", RULES["all"], "all_gather", torch.float32, gradients=True)
    assert block_masks.num_fallbacks() == 0
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "kinds"), [(2, ["all_gather", "a2a"]), (3, ["all_gather"])])
def test_tokens_on_several_ranks_attend_as_on_one(world_size: int, kinds: list[str]) -> None:
    run_distributed(all_of_them, world_size, kinds)


def kept_by_autograd() -> tuple[int, int, int]:
    """(bytes that two layers keep of a row, bytes of what this rank was given, gradient of the scores that are joined)."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    segments = torch.tensor([[0, 512, 0, 0], [512, 88, 0, 400]])
    share = row_share(segments, group, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(share.places.numel(), 1, heads, 16, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    attention = module("sdpa", RULES["plain"], torch.float32, SimpleNamespace(cp=group), "all_gather")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = attention(*leaves, segments)
    output.sum().backward()
    own = torch.tensor([1.0 + group.rank()], requires_grad=True)
    join_scores(own, torch.tensor([group.rank()]), 2, group).square().sum().backward()
    assert own.grad is not None
    dist.destroy_process_group()
    return sum(kept.values()), sum(leaf.untyped_storage().nbytes() for leaf in leaves), int(own.grad)


@pytest.mark.dist
def test_keys_of_other_ranks_are_not_kept_and_joined_scores_have_the_gradients_of_all_ranks_losses() -> None:
    for rank, (kept, given, gradient) in enumerate(run_distributed(kept_by_autograd, 2)):
        assert kept <= given
        # Of the sum of squares of both scores, on each of two ranks.
        assert gradient == 2 * 2 * (1 + rank)
