"""The order of pairs."""

from __future__ import annotations

import numpy as np

from megatron_rmipo.data.batches.order import PairOrder


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
