"""What pairs take in a pack, against the rows that are laid out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_rmipo.data.batches.packing import pack_pairs, pack_responses
from megatron_rmipo.data.batches.sizes import (
    CostModel,
    check_capacity,
    conditional_sizes,
    conditional_tokens,
    unconditional_sizes,
)
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError
from tests.integration.problem import make_pairs

COST = CostModel(per_token=3.0, per_area=0.25, per_scored_token=2.0)


def make_rows() -> list[TokenizedPair]:
    """Pairs, and rows with one of their two responses, each kind with responses of one token and of more."""
    pairs, none = make_pairs(), np.empty(0, dtype=np.int64)
    without = [dataclasses.replace(pair, **{side: none}) for pair in pairs for side in ("chosen", "rejected")]
    assert {tuple(np.minimum([row.chosen.size, row.rejected.size], 2)) for row in [*pairs, *without]} == {
        (1, 1), (1, 2), (2, 2), (0, 1), (0, 2), (1, 0), (2, 0)
    }  # fmt: skip
    return [*pairs, *without]


@pytest.mark.parametrize(("share_prompts", "with_rejected"), [(True, True), (False, True), (True, False), (False, False)])
def test_conditional_sizes_are_those_of_the_row(share_prompts: bool, with_rejected: bool) -> None:
    pairs = make_rows()
    lengths = np.array([[p.prompt.size, p.chosen.size, p.rejected.size] for p in pairs])
    sizes = conditional_sizes(lengths, COST, share_prompts=share_prompts, with_rejected=with_rejected)
    for pair, tokens, cost in zip(pairs, sizes.tokens, sizes.costs, strict=True):
        row = pack_pairs([pair], [0], share_prompts=share_prompts, with_rejected=with_rejected)
        segments = row.segments.tolist()[: -1 if row.num_padding else None]  # an empty row stands as one token of padding
        area = sum(length * (length + 1) // 2 + length * prefix for _, length, _, prefix in segments)
        assert tokens == row.num_tokens - row.num_padding
        assert cost == 3.0 * tokens + 0.25 * area + 2.0 * row.num_scored
    alone = conditional_tokens(lengths, share_prompts=share_prompts, with_rejected=with_rejected)
    assert alone.tolist() == sizes.tokens.tolist()


def test_sizes_of_rows_with_one_response_by_hand() -> None:
    lengths = np.array([[5, 3, 0], [5, 0, 3], [4, 1, 0], [4, 0, 1]])
    for share_prompts in (True, False):
        sizes = conditional_sizes(lengths, COST, share_prompts=share_prompts, with_rejected=True)
        assert sizes.tokens.tolist() == [7, 7, 4, 4]
        assert sizes.costs.tolist() == [3 * 7 + 28 / 4 + 2 * 3] * 2 + [3 * 4 + 10 / 4 + 2 * 1] * 2
        alone = conditional_sizes(lengths, COST, share_prompts=share_prompts, with_rejected=False)
        assert (alone.tokens.tolist(), alone.costs[1::2].tolist()) == ([7, 0, 4, 0], [0, 0])
    for has_context, tokens in ((True, [3, 3, 1, 1]), (False, [2, 2, 0, 0])):
        assert unconditional_sizes(lengths, COST, has_context_token=has_context, with_rejected=True).tokens.tolist() == tokens


@pytest.mark.parametrize("with_rejected", [True, False])
@pytest.mark.parametrize("context", [1, None])
def test_unconditional_sizes_are_those_of_the_row(context: int | None, with_rejected: bool) -> None:
    pairs = make_rows()
    lengths = np.array([[p.prompt.size, p.chosen.size, p.rejected.size] for p in pairs])
    sizes = unconditional_sizes(lengths, COST, has_context_token=context is not None, with_rejected=with_rejected)
    for pair, tokens, cost in zip(pairs, sizes.tokens, sizes.costs, strict=True):
        row = pack_responses([pair], [0], context_token_id=context, with_rejected=with_rejected)
        segments = row.segments.tolist()[: -1 if row.num_padding else None]
        area = sum(length * (length + 1) // 2 for _, length, _, _ in segments)
        assert tokens == row.num_tokens - row.num_padding
        assert cost == 3.0 * tokens + 0.25 * area + 2.0 * row.num_scored


def test_a_pair_that_fits_no_pack_is_named_with_the_value_that_would_work() -> None:
    tokens = conditional_tokens(np.array([[5, 3, 3], [50, 20, 30], [5, 2, 2]]), share_prompts=True, with_rejected=True)
    pieces = [(0, tokens[:1]), (1, tokens[1:])]
    with pytest.raises(ConfigError, match=r"--tokens-per-microbatch 60: pair 1 needs 98 tokens.*1 pairs.*98 or more"):
        check_capacity(pieces, 60, lambda number: f"pair {number}")
    assert check_capacity(pieces, 98, lambda number: f"pair {number}") == 98
