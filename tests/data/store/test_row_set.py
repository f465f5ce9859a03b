"""A bit a row: what is added is there once, in stored order, and the last byte holds no row too many."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rmipo.data.store import row_set
from megatron_rmipo.data.store.row_set import RowSet


@pytest.mark.parametrize("num_rows", [1, 8, 43, 1003])
def test_rows_come_back_ascending_in_blocks(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_set, "_BYTES", 3)
    rng = np.random.default_rng(num_rows)
    first, second = (rng.integers(0, num_rows, num_rows) for _ in range(2))
    rows, other = RowSet(num_rows), RowSet(num_rows)
    rows.add(first)
    rows.add(first[:5])
    other.add(second)
    for found, expected in (
        (rows, np.unique(first)),
        (rows & other, np.intersect1d(first, second)),
        (RowSet.whole(num_rows), np.arange(num_rows)),
        (RowSet.whole(num_rows) & rows, np.unique(first)),
        (RowSet(num_rows), np.empty(0)),
    ):
        assert len(found) == len(expected)
        blocks = list(found.blocks(7))
        assert [len(block) for block in blocks[:-1]] == [7] * (len(blocks) - 1)
        assert all(len(block) > 0 for block in blocks)
        assert np.concatenate([np.empty(0), *blocks]).tolist() == expected.tolist()
