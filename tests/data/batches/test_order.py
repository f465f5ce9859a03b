"""The order of pairs."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.order_names import pair_order
from megatron_rmipo.data.batches.permuted_order import PermutedOrder
from megatron_rmipo.errors import ConfigError

BOTH = pytest.mark.parametrize("kind", [PairOrder, PermutedOrder])


@BOTH
def test_every_epoch_shows_every_pair_once_in_another_order(kind: type[PairOrder]) -> None:
    order = kind(num_pairs=23, seed=9)
    batches = [order.batch(consumed, 5, 46) for consumed in range(0, 46, 5)]
    assert [len(batch) for batch in batches] == [5] * 9 + [1]
    seen = np.concatenate(batches)
    assert seen.dtype == np.int64
    assert sorted(seen[:23].tolist()) == sorted(seen[23:].tolist()) == list(range(23))
    assert seen[:23].tolist() != seen[23:].tolist()
    assert seen.tolist() == [*order.epoch(0).tolist(), *order.epoch(1).tolist()]


@BOTH
def test_the_order_depends_on_seed_and_consumed_pairs_alone(kind: type[PairOrder]) -> None:
    one, other = kind(23, 9), kind(23, 9)
    assert one.batch(15, 5, 46).tolist() == other.batch(15, 5, 46).tolist()
    # Another batch size after a resume goes on where the run was.
    assert np.concatenate([other.batch(15, 3, 46), other.batch(18, 2, 46)]).tolist() == one.batch(15, 5, 46).tolist()
    assert kind(23, 10).batch(15, 5, 46).tolist() != one.batch(15, 5, 46).tolist()


@BOTH
def test_a_batch_larger_than_the_data_spans_epochs(kind: type[PairOrder]) -> None:
    batch = kind(4, 0).batch(0, 11, 11)
    assert np.bincount(batch).tolist() in ([3, 3, 3, 2], [3, 3, 2, 3], [3, 2, 3, 3], [2, 3, 3, 3])


def test_every_number_of_pairs_is_permuted() -> None:
    for num_pairs in (*range(1, 331), 1024, 65_537, 99_991):
        assert np.array_equal(np.sort(PairOrder(num_pairs, 3).epoch(1)), np.arange(num_pairs)), num_pairs


def test_places_far_inside_large_data_are_found_alone() -> None:
    order = PairOrder(99_991, 8)
    assert np.array_equal(order.places(2, 70_123, 70_140), order.epoch(2)[70_123:70_140])
    far = PairOrder(60_000_001, 8).batch(59_999_990, 20, 1 << 40)
    assert (len(set(far.tolist())), far.min() >= 0, far.max() < 60_000_001) == (20, True, True)
    assert (np.diff(PairOrder((1 << 62) + 1, 8).batch(5, 7, 12)) != 1).all()


def excess(places: np.ndarray, num_kinds: int) -> float:
    """Chi-square of drawn numbers below ``num_kinds`` against even ones, in standard deviations above what chance gives."""
    counts, expected = np.bincount(places, minlength=num_kinds), len(places) / num_kinds
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - (num_kinds - 1)) / math.sqrt(2 * (num_kinds - 1))


@pytest.mark.parametrize("num_pairs", [3, 5, 8, 37])
def test_first_last_and_neighbours_are_drawn_evenly(num_pairs: int) -> None:
    # Seeds and epochs that are close to each other, as people give them.
    drawn = np.array([PairOrder(num_pairs, seed).epoch(epoch) for seed in range(600) for epoch in range(4)])
    assert excess(drawn[:, 0], num_pairs) < 5
    assert excess(drawn[:, -1], num_pairs) < 5
    middle, after = drawn[:, num_pairs // 2 - 1], drawn[:, num_pairs // 2]
    # Of n (n - 1) ordered pairs: the second among those that are left.
    assert excess(middle * (num_pairs - 1) + after - (after > middle), num_pairs * (num_pairs - 1)) < 5
    if num_pairs <= 5:
        kinds = {kind: number for number, kind in enumerate(permutations(range(num_pairs)))}
        assert excess(np.array([kinds[tuple(one)] for one in drawn.tolist()]), len(kinds)) < 5
    if num_pairs > 5:
        # Where a pair stood in the epoch before, or with the seed before, says nothing of where it stands now.
        for apart in (1, 4):
            assert excess(drawn[:-apart, 0] * num_pairs + drawn[apart:, 0], num_pairs**2) < 5


def test_a_run_s_order_stays_what_it_was() -> None:
    assert PairOrder(1000, 1234).batch(2995, 8, 3003).tolist() == [159, 876, 547, 150, 432, 880, 799, 367]
    # As NumPy's Generator.permutation gives it: what versions before did.
    for num_pairs, seed, epoch in ((23, 9, 0), (1001, 1234, 3)):
        expected = np.random.default_rng((seed, epoch)).permutation(num_pairs)
        assert PermutedOrder(num_pairs, seed).epoch(epoch).tolist() == expected.tolist()
    assert PermutedOrder(23, 9).epoch(0).tolist()[:8] == [9, 18, 6, 17, 16, 3, 2, 15]


def test_an_order_is_found_by_the_name_that_a_run_kept() -> None:
    assert [type(pair_order(name, 5, 1)) for name in ("keyed", "permuted", "")] == [PairOrder, PermutedOrder, PermutedOrder]
    with pytest.raises(ConfigError, match=r"order 'sorted': this version knows the orders of pairs 'keyed' and 'permuted'"):
        pair_order("sorted", 5, 1)
