"""Which pairs a run will see, and in which rows of the data sets they stand: streamed, whatever the size of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.row_set import RowSet

# Pairs looked at together: 2 MB of indices.
_CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class SeenPairs:
    """Those pairs of a collection that a run will see.

    Attributes:
        pairs: the collection.
        chunks: gives their indices, int64 ``[n]`` at a time, in any order and any number of times.
    """

    pairs: PairCollection
    chunks: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def first(cls, pairs: PairCollection, number: int | None = None) -> SeenPairs:
        """The first ones of a collection; None for all."""
        return cls(pairs, partial(_first, len(pairs) if number is None else number))

    @classmethod
    def in_order(cls, pairs: PairCollection, order: PairOrder, consumed_pairs: int, total_pairs: int) -> SeenPairs:
        """What a run that has seen ``consumed_pairs`` sees until it has seen ``total_pairs``."""
        first_epoch = -(-consumed_pairs // order.num_pairs)
        if (first_epoch + 1) * order.num_pairs <= total_pairs:
            return cls.first(pairs)
        return cls(pairs, partial(_batches, order, consumed_pairs, total_pairs))


def _first(number: int) -> Iterator[np.ndarray]:
    for start in range(0, number, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, number))


def _batches(order: PairOrder, consumed_pairs: int, total_pairs: int) -> Iterator[np.ndarray]:
    for start in range(consumed_pairs, total_pairs, _CHUNK):
        yield order.batch(start, _CHUNK, total_pairs)


def seen_rows(seen: Sequence[SeenPairs]) -> dict[str, RowSet]:
    """In which rows of each data set the pairs stand, by its prefix."""
    rows = {store.prefix: RowSet(len(store)) for one in seen for store in one.pairs.stores}
    for one in seen:
        for indices in one.chunks():
            which, places = one.pairs.rows_of(indices)
            for number in np.flatnonzero(np.bincount(which)).tolist():
                rows[one.pairs.stores[number].prefix].add(places[which == number])
    return rows
