"""The block mask of FlexAttention against torch's own and the definition, and what compiles it anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from megatron_rmipo.model.attention import flex as block_masks
from megatron_rmipo.model.attention.deal import whole_runs
from megatron_rmipo.model.attention.flex import RowMask, attend_flex, row_mask_arrays
from megatron_rmipo.model.attention.packed import PackedAttention
from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules
from megatron_rmipo.model.attention.sdpa import attend_runs
from tests.model.attention.rows import attention_config, dense_mask, random_segments

ROWS = {
    # name -> (segments, tokens); lengths around blocks of 128.
    "one segment of one block": ([[0, 128, 0, 0]], 128),
    "shorter than a block": ([[0, 9, 0, 0], [9, 3, 0, 5], [12, 1, 0, 0]], 13),
    "a prompt of whole blocks": ([[0, 300, 0, 0], [300, 212, 0, 256]], 512),
    "a one-token response: prefix and segment adjoin": ([[0, 256, 0, 0], [256, 256, 0, 256]], 512),
    "prefixes that start within a block": ([[0, 70, 0, 0], [70, 500, 0, 0], [570, 190, 70, 400], [760, 8, 0, 0]], 768),
    "many short pairs": ([part for n in range(40) for part in ([n * 16, 11, 0, 0], [n * 16 + 11, 5, n * 16, 7])], 640),
    "no prefixes, one segment over the rest": ([[0, 1, 0, 0], [1, 130, 0, 0], [131, 1000, 0, 0]], 1131),
}


def arrays_of(segments: Tensor, num_tokens: int, window: int | None = None) -> RowMask:
    arrays = row_mask_arrays(whole_runs(segments.numpy()), max(2, -(-num_tokens // 128)), window)
    return RowMask(*map(torch.from_numpy, arrays))


@pytest.mark.parametrize("window", [None, 1, 100, 129, 300, 5000])
@pytest.mark.parametrize("name", ROWS)
def test_tables_are_those_that_torch_finds_in_the_dense_mask(name: str, window: int | None) -> None:
    segments, num_tokens = torch.tensor(ROWS[name][0]), ROWS[name][1]
    ours = arrays_of(segments, num_tokens, window)
    length = ours.own_start.numel()
    padded = torch.cat([segments, torch.tensor([[num_tokens, length - num_tokens, 0, 0]])]) if length > num_tokens else segments
    mask = dense_mask(padded, window)
    theirs = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, length, length, device="cpu")
    for field in RowMask._fields[3:11]:
        ours_now, theirs_now = getattr(ours, field), getattr(theirs, field)
        assert (ours_now.dtype, ours_now.shape) == (theirs_now.dtype, theirs_now.shape), field
        assert torch.equal(ours_now, theirs_now), field


@pytest.mark.parametrize("window", [None, 1, 30, 70])
@pytest.mark.parametrize("seed", range(4))
def test_tables_and_bounds_together_say_the_mask_of_any_row(seed: int, window: int | None) -> None:
    segments = random_segments(seed, pairs=9, longest=90)
    num_tokens = int(segments[-1, :2].sum())
    ours = arrays_of(segments, num_tokens, window)
    length = ours.own_start.numel()
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    own_start, prefix_start, prefix_end = (bound.flatten()[:, None] for bound in ours[:3])
    by_token = ((k <= q) & (k >= own_start)) | ((k >= prefix_start) & (k < prefix_end))
    assert torch.equal(by_token[:num_tokens, :num_tokens], dense_mask(segments, window))
    # A kernel looks at no block that is in no table, and asks nothing of the tokens of a full one.
    for counts, indices, transposed in ((ours.kv_num_blocks, ours.kv_indices, False), (ours.q_num_blocks, ours.q_indices, True)):
        partial, full = listed(counts, indices), listed(*ours[5:7]) if not transposed else listed(*ours[9:11])
        grid = by_token.T if transposed else by_token
        assert torch.equal(spread(partial, length) & grid | spread(full, length), grid)
        assert not (partial & full).any()


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool ``[B, B]`` of the blocks in a table."""
    flags = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        flags[row, indices[0, 0, row, :count].long()] = True
    return flags


def spread(flags: Tensor, length: int) -> Tensor:
    return flags.repeat_interleave(128, 0).repeat_interleave(128, 1)[:length, :length]


@pytest.fixture
def compilations() -> Iterator[None]:
    torch._dynamo.reset()
    block_masks._compiled.cache_clear()
    block_masks._row_mask.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compilations")
def test_rows_of_other_lengths_compile_nothing_anew() -> None:
    attention = PackedAttention(attention_config(heads=4, groups=2, size=16), layer_number=1, backend="flex")
    generator = torch.Generator().manual_seed(5)
    # B of 2, 3, 4, ... among them those that equal a number of heads or the size of a head, first as well as later.
    rows = [random_segments(seed, pairs=pairs, longest=60) for seed, pairs in enumerate((6, 9, 2, 4, 12, 1, 7, 3, 16))]
    blocks = {max(2, -(-int(row[-1, :2].sum()) // 128)) for row in rows}
    assert {2, 4, 8} <= blocks
    assert len(blocks) >= 5
    with torch.no_grad():
        for segments in rows:
            num_tokens = int(segments[-1, :2].sum())
            mixed = torch.randn(num_tokens, 1, 8, 16, generator=generator)
            attention(mixed[:, :, :4], mixed[:, :, 4:6], mixed[:, :, 6:], segments)
            assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("compilations")
def test_the_compiler_knows_one_unknown_length_and_that_rows_end_with_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        shapes.extend(value.shape for value in values if isinstance(value, Tensor))
        return graph.forward

    compiled = torch.compile(block_masks._attend_blocks, backend=look, fullgraph=True, dynamic=False)
    monkeypatch.setattr(block_masks, "_compiled", lambda device_type: compiled)
    query = torch.randn(300, 3, 16)
    attend_flex(query, query, query, np.array([[0, 300, 0, 0, 0]]), 0.3)
    sizes = {size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt)}
    # B, and T.
    (unknown,) = {symbol for size in sizes for symbol in size.free_symbols}
    assert sizes == {unknown, 128 * unknown}


@pytest.mark.usefixtures("compilations")
@pytest.mark.skipif(not hasattr(torch_flex, "_validate_device"), reason="this torch has another check of the device")
@pytest.mark.parametrize("rules", [PLAIN, ScoreRules(window=37, softcap=1.3, sinks=True)])
def test_gradients_are_those_of_sdpa_and_training_compiles_once_more(rules: ScoreRules, monkeypatch: pytest.MonkeyPatch) -> None:
    """By FlexAttention's reference implementation, whose backward pass torch does not offer on the CPU but has."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    compiled = torch.compile(block_masks._attend_blocks, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(block_masks, "_compiled", lambda device_type: compiled)
    config = attention_config(heads=6, groups=2, size=16)
    flex, sdpa = (PackedAttention(config, layer_number=1, backend=backend, rules=rules) for backend in ("flex", "sdpa"))
    if rules.sinks:
        sdpa.load_state_dict(flex.state_dict())
    generator = torch.Generator().manual_seed(5)
    for seed, pairs in enumerate((6, 3, 9, 2, 12)):
        segments = random_segments(seed, pairs=pairs, longest=60)
        num_tokens = int(segments[-1, :2].sum())
        leaves = [torch.randn(num_tokens, 1, 10, 16, generator=generator).requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        upstream = torch.randn(num_tokens, 1, 96, generator=generator)
        for attention, mixed in zip((flex, sdpa), leaves, strict=True):
            attention(*mixed.split([6, 2, 2], dim=2), segments).backward(upstream)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=2e-5)
        if flex.softmax_offset is not None and sdpa.softmax_offset is not None:
            torch.testing.assert_close(flex.softmax_offset.grad, sdpa.softmax_offset.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            flex(*leaves[0].split([6, 2, 2], dim=2), segments)
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("compilations")
def test_rows_that_want_more_kernels_than_are_compiled_are_computed_by_sdpa(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(block_masks, "MOST_COMPILATIONS", 3)
    segments = random_segments(1, pairs=2, longest=30)
    monkeypatch.setattr(block_masks, "_fallbacks", 0)
    compiler = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(compiler, "level", compiler.level)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        # The first is met again, and has its kernel.
        for fallbacks, heads in ((0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (2, 1)):
            row = torch.randn(int(segments[-1, :2].sum()), heads, 16, generator=torch.Generator().manual_seed(heads))
            expected = attend_runs(row, row, row, whole_runs(segments.numpy()), 0.3)
            torch.testing.assert_close(
                attend_flex(row, row, row, whole_runs(segments.numpy()), 0.3), expected, rtol=1e-4, atol=1e-5
            )
            assert block_masks.num_fallbacks() == fallbacks
    assert counters["stats"]["unique_graphs"] == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.name == block_masks.__name__]
    assert "3 kernels are compiled" in warning


@pytest.mark.usefixtures("compilations")
def test_a_mask_is_made_once_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    build = block_masks.row_mask_arrays
    monkeypatch.setattr(block_masks, "row_mask_arrays", lambda *args, **named: made.append(1) or build(*args, **named))  # type: ignore[func-returns-value]
    packs = [random_segments(seed, pairs=3, longest=30) for seed in range(3)]
    query = torch.randn(200, 2, 16)
    # Two layers forward, pack after pack, then the same recomputed from a copy of the segments, as a checkpoint saves it.
    with torch.no_grad():
        for segments in (*packs, *packs, *(segments.clone() for segments in packs)):
            num_tokens = int(segments[-1, :2].sum())
            attend_flex(query[:num_tokens], query[:num_tokens], query[:num_tokens], whole_runs(segments.numpy()), 0.3)
    assert len(made) == 3


def test_the_mask_of_a_long_row_needs_little_memory() -> None:
    """Pieces times blocks, not tokens times tokens: 16,384 tokens would be 256 MiB."""
    lengths = np.full(128, 128)
    segments = np.stack([np.cumsum(lengths) - lengths, lengths, lengths * 0, lengths * 0], 1)
    segments[1::2, 2:] = np.stack([segments[0::2, 0], np.full(64, 100)], 1)
    arrays = row_mask_arrays(whole_runs(segments), 128)
    assert sum(array.nbytes for array in arrays) < 2**19
