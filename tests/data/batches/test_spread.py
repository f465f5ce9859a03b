"""The spread over ranks, the cut into packs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_rmipo.data.batches.sizes import PairSizes
from megatron_rmipo.data.batches.spread import cheapest_at_both_ends, cut_into_packs, fill_packs, split_packs, spread_evenly


def sizes_of(tokens: np.ndarray, costs: np.ndarray) -> PairSizes:
    zeros = np.zeros(len(tokens))
    return PairSizes(tokens, costs, head_costs=zeros, backward_costs=2 * costs, head_backward_costs=zeros)


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
    packs = cut_into_packs(share, sizes_of(tokens, costs), 97)
    assert sorted(itertools.chain(*packs)) == share
    assert max(tokens[pack].sum() for pack in packs) <= 97
    assert len(packs) <= -(-tokens[share].sum() // 97) + 6
    loads = [costs[pack].sum() for pack in packs]
    assert max(loads) / np.mean(loads) < 1.5, "packs are even in cost"


def test_at_least_so_many_packs_where_there_are_pairs_for_them() -> None:
    tokens = np.random.default_rng(2).integers(5, 60, size=41)
    share = list(range(3, 41))
    sizes = sizes_of(tokens, tokens.astype(float))
    few = cut_into_packs(share, sizes, 2000)
    assert len(few) == 1
    packs = cut_into_packs(share, sizes, 2000, 12)
    assert len(packs) == 12
    assert sorted(itertools.chain(*packs)) == share
    assert max(loads_of(sizes.costs, packs)) < 1.05 * np.mean(loads_of(sizes.costs, packs))
    assert sorted(cut_into_packs(share, sizes, 2000, 99)) == [[position] for position in share]
    assert cut_into_packs(share, sizes, 97, 2) == cut_into_packs(share, sizes, 97), "capacity asks for more"


def test_the_cheapest_packs_stand_at_both_ends() -> None:
    sizes = sizes_of(np.ones(6), np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.5]))
    assert cheapest_at_both_ends([[0], [1, 5], [], [2], [3], [4]], sizes) == [[], [3], [4], [0], [2], [1, 5]]


def test_one_pair_of_exactly_the_capacity_fits() -> None:
    sizes = sizes_of(np.array([10, 10]), np.array([3.0, 3.0]))
    assert sorted(cut_into_packs([0, 1], sizes, 10)) == [[0], [1]]
    assert cut_into_packs([], sizes, 10) == []


def test_rows_without_tokens_share_a_pack() -> None:
    sizes = sizes_of(np.array([0, 4, 0]), np.array([0.0, 2.0, 0.0]))
    assert cut_into_packs([0, 2], sizes, 10) == [[0, 2]]
    assert sorted(itertools.chain(*cut_into_packs([0, 1, 2], sizes, 4))) == [0, 1, 2]


def test_packs_are_split_where_they_cost_most_and_single_pairs_stay() -> None:
    sizes = sizes_of(np.array([9, 2, 2, 2, 2]), np.array([9.0, 2.0, 2.0, 2.0, 2.0]))
    packs = [[0], [1, 2, 3], [4]]
    assert sorted(split_packs(packs, sizes, 4)) == [[0], [1, 3], [2], [4]]
    assert sorted(split_packs(packs, sizes, 9)) == [[0], [1], [2], [3], [4]]
    assert split_packs(packs, sizes, 2) == packs


def test_a_fixed_number_of_packs_holds_every_pair_once_and_evenly() -> None:
    for seed in range(10):
        tokens = np.random.default_rng(seed).integers(5, 60, size=41)
        costs = tokens.astype(float) ** 2
        share = list(range(3, 41))
        for num_packs in (1, 7, 11):
            packs = fill_packs(share, sizes_of(tokens, costs), 2000, num_packs)
            assert packs is not None
            assert len(packs) == num_packs
            assert sorted(itertools.chain(*packs)) == share
            assert packs == [sorted(pack) for pack in packs]
            assert max(loads_of(costs, packs)) <= max(1.2 * costs[share].sum() / num_packs, costs.max())


def test_fewer_pairs_than_packs_leaves_the_last_ones_empty() -> None:
    sizes = sizes_of(np.array([4, 7, 5]), np.array([4.0, 7.0, 5.0]))
    packs = fill_packs([2, 0], sizes, 10, 4)
    assert packs is not None
    assert sorted(packs[:2]) == [[0], [2]]
    assert packs[2:] == [[], []]
    assert fill_packs([], sizes, 10, 2) == [[], []]


def test_even_tokens_where_even_costs_do_not_fit() -> None:
    sizes = sizes_of(np.array([6, 6, 2, 2]), np.array([1.0, 1.0, 9.0, 9.0]))
    assert fill_packs([0, 1, 2, 3], sizes, 8, 2) is not None
    crossed = sizes_of(np.array([9, 1, 5, 5]), np.array([6.0, 5.0, 4.0, 3.0]))
    by_cost = spread_evenly(crossed.costs, 2)
    assert max(crossed.tokens[pack].sum() for pack in by_cost) > 10
    assert fill_packs([0, 1, 2, 3], crossed, 10, 2) == [[0, 1], [2, 3]]
    assert fill_packs([0, 1, 2, 3], crossed, 9, 2) is None
