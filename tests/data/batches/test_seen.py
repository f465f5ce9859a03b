"""Which rows a run will see: counted against every batch of it, for one data set and for blends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.data.batches import seen as module
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.seen import SeenPairs, seen_rows
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.in_memory import PairsInMemory


def store(name: str, num_rows: int) -> Any:
    return PairsInMemory([([1], [2], [3])] * num_rows, prefix=name)


def blend() -> PairCollection:
    """The first pairs of two data sets, those of one of them more than once."""
    parts = [PairCollection([store("a", 23)]).split(0.2)[0], PairCollection([store("b", 7)]).split(0.2)[0]]
    return PairCollection.combine(parts, [0.5, 0.5])


@pytest.mark.parametrize(("consumed", "total"), [(0, 5), (6, 17), (30, 41), (0, 36), (17, 60), (35, 72), (5, 300), (9, 9)])
def test_rows_are_those_of_all_batches_that_are_left(consumed: int, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5)
    pairs, batch = blend(), 3
    assert len(pairs) == 36
    order = PairOrder(len(pairs), seed=11)
    expected: dict[str, set[int]] = {"a": set(), "b": set()}
    for first in range(consumed, total, batch):
        for index in order.batch(first, batch, total).tolist():
            _, row, _, name = pairs.describe(index).split()
            expected[name].add(int(row))
    found = seen_rows([SeenPairs.in_order(pairs, order, consumed, total)])
    rows = {name: [row for block in rows.blocks(4) for row in block.tolist()] for name, rows in found.items()}
    assert rows == {name: sorted(numbers) for name, numbers in expected.items()}


def test_data_that_is_trained_on_and_held_out_is_counted_once() -> None:
    whole = PairCollection([store("a", 23)])
    train, held_out = whole.split(0.3)
    found = seen_rows([SeenPairs.in_order(train, PairOrder(len(train), 0), 0, 6), SeenPairs.first(held_out, 4)])
    order = np.sort(PairOrder(16, 0).batch(0, 6, 6))
    assert np.concatenate(list(found["a"].blocks(100))).tolist() == [*order.tolist(), 16, 17, 18, 19]
    assert len(seen_rows([SeenPairs.first(whole)])["a"]) == 23


def test_rows_of_a_blend_are_those_of_each_pair_by_itself(tmp_path: Path) -> None:
    pairs = blend()
    indices = np.random.default_rng(5).permutation(len(pairs))[:29]
    which, rows = pairs.rows_of(indices)
    assert [pairs.describe(index) for index in indices.tolist()] == [
        f"pair {row} of {pairs.stores[number].prefix}" for number, row in zip(which.tolist(), rows.tolist(), strict=True)
    ]
    assert (which.dtype, rows.dtype) == (np.int64, np.int64)
