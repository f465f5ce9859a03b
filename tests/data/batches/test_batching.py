"""The order of pairs, their spread over ranks, the cut into packs."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_rmipo.data.batches.batching import (
    CostModel,
    PairOrder,
    PairSizes,
    check_capacity,
    conditional_sizes,
    cut_into_packs,
    spread_evenly,
    unconditional_sizes,
)
from megatron_rmipo.data.batches.packing import pack_pairs, pack_responses
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError
from tests.integration.problem import make_pairs

COST = CostModel(per_token=3.0, per_area=0.25, per_scored_token=2.0)


def test_every_epoch_shows_every_pair_once_in_another_order() -> None:
    order = PairOrder(num_pairs=23, seed=9)
    batches = [order.batch(consumed, 5, 46) for consumed in range(0, 46, 5)]
    assert [len(batch) for batch in batches] == [5] * 9 + [1]
    seen = np.concatenate(batches)
    assert sorted(seen[:23].tolist()) == sorted(seen[23:].tolist()) == list(range(23))
    assert seen[:23].tolist() != seen[23:].tolist()


def test_the_order_depends_on_seed_and_consumed_pairs_alone() -> None:
    one, other = PairOrder(23, 9), PairOrder(23, 9)
    assert one.batch(15, 5, 46).tolist() == other.batch(15, 5, 46).tolist()
    # Another batch size after a resume goes on where the run was.
    assert np.concatenate([other.batch(15, 3, 46), other.batch(18, 2, 46)]).tolist() == one.batch(15, 5, 46).tolist()
    assert PairOrder(23, 10).batch(15, 5, 46).tolist() != one.batch(15, 5, 46).tolist()


def test_a_batch_larger_than_the_data_spans_epochs() -> None:
    batch = PairOrder(4, 0).batch(0, 11, 11)
    assert np.bincount(batch).tolist() in ([3, 3, 3, 2], [3, 3, 2, 3], [3, 2, 3, 3], [2, 3, 3, 3])


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


def loads_of(costs: np.ndarray, shares: list[list[int]]) -> list[float]:
    return [float(costs[share].sum()) for share in shares]


def longest_first(costs: np.ndarray, num_shares: int) -> list[float]:
    """Loads where each pair, costliest first, goes to the share that has least so far, and stays there."""
    loads = [0.0] * num_shares
    for cost in sorted(costs.tolist(), reverse=True):
        loads[loads.index(min(loads))] += cost
    return loads


def test_ranks_share_all_pairs_evenly() -> None:
    for seed in range(20):
        costs = np.random.default_rng(seed).lognormal(sigma=0.8, size=128)
        for num_ranks, bound in ((8, 1.001), (16, 1.003), (32, 1.02)):
            shares = spread_evenly(costs, num_ranks)
            assert sorted(itertools.chain(*shares)) == list(range(128))
            assert all(costs[share].tolist() == sorted(costs[share], reverse=True) for share in shares)
            loads = loads_of(costs, shares)
            # The costliest pair is a share of its own at least.
            assert max(loads) <= max(bound * np.mean(loads), costs.max())


def test_an_exchange_mends_what_longest_first_leaves() -> None:
    costs = np.array([3.0, 4.0, 3.0, 5.0, 3.0])
    assert sorted(longest_first(costs, 2)) == [8.0, 10.0]
    assert loads_of(costs, spread_evenly(costs, 2)) == [9.0, 9.0]
    assert sorted(sorted(costs[share]) for share in spread_evenly(costs, 2)) == [[3.0, 3.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("num_pairs", [1, 7, 33, 64, 65])
def test_exchanges_never_make_it_worse_and_end(num_pairs: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for costs in (rng.lognormal(sigma=1.5, size=num_pairs), rng.integers(1, 4, size=num_pairs) * 1.1, np.zeros(num_pairs)):
            for num_shares in (1, 2, 5, 33):
                shares = spread_evenly(costs, num_shares)
                assert sorted(itertools.chain(*shares)) == list(range(num_pairs))
                assert max(loads_of(costs, shares)) <= max(longest_first(costs, num_shares)) * (1 + 1e-12)
                assert spread_evenly(costs.copy(), num_shares) == shares


def test_a_pair_above_the_mean_stays_alone() -> None:
    shares = spread_evenly(np.array([1.0, 1.0, 9.0, 1.0, 1.0]), 3)
    assert sorted(map(sorted, shares)) == [[0, 3], [1, 4], [2]]


def test_fewer_pairs_than_ranks_leaves_ranks_without() -> None:
    assert sorted(len(share) for share in spread_evenly(np.ones(2), 3)) == [0, 1, 1]


def test_packs_hold_every_pair_once_within_capacity() -> None:
    tokens = np.random.default_rng(2).integers(5, 60, size=41)
    share = list(range(3, 41))
    costs = tokens.astype(float) ** 2
    packs = cut_into_packs(share, PairSizes(tokens, costs), 97)
    assert sorted(itertools.chain(*packs)) == share
    assert max(tokens[pack].sum() for pack in packs) <= 97
    assert len(packs) <= -(-tokens[share].sum() // 97) + 6
    loads = [costs[pack].sum() for pack in packs]
    assert max(loads) / np.mean(loads) < 1.5, "packs are even in cost"


def test_one_pair_of_exactly_the_capacity_fits() -> None:
    sizes = PairSizes(np.array([10, 10]), np.array([3.0, 3.0]))
    assert sorted(cut_into_packs([0, 1], sizes, 10)) == [[0], [1]]
    assert cut_into_packs([], sizes, 10) == []


def test_rows_without_tokens_share_a_pack() -> None:
    sizes = PairSizes(np.array([0, 4, 0]), np.array([0.0, 2.0, 0.0]))
    assert cut_into_packs([0, 2], sizes, 10) == [[0, 2]]
    assert sorted(itertools.chain(*cut_into_packs([0, 1, 2], sizes, 4))) == [0, 1, 2]


def test_a_pair_that_fits_no_pack_is_named_with_the_value_that_would_work() -> None:
    sizes = conditional_sizes(np.array([[5, 3, 3], [50, 20, 30]]), COST, share_prompts=True, with_rejected=True)
    with pytest.raises(ConfigError, match=r"--tokens-per-microbatch 60: pair 1 needs 98 tokens.*1 pairs.*98 or more"):
        check_capacity(sizes, 60, lambda number: f"pair {number}")
    check_capacity(sizes, 98, lambda number: f"pair {number}")
