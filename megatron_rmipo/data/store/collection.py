"""Pairs of one or more prepared data sets under one numbering, with what a reference said of them.

Shape letter: P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rmipo.data.store.in_memory import IdLists, PairsInMemory
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.data.store.reference_scores import Kind, ScoreTable
from megatron_rmipo.errors import DataError


class PairCollection(Sequence[TokenizedPair]):
    """Pairs of one or more prepared data sets under one numbering.

    Args:
        stores: the data sets.
        members: int64 ``[P]``, which pairs, numbered through the data sets one after the other; None for all.

    Attributes:
        stores, members: as given.
        lengths: int32 ``[P, 3]``: tokens of prompt, chosen, rejected.
        reference_scores: of each data set's rows, see :mod:`megatron_rmipo.data.store.reference_scores`; None where not needed.
        mismatched: the same prompts with responses of other rows; None where not needed.
    """

    def __init__(self, stores: Sequence[PairStore], members: np.ndarray | None = None) -> None:
        self.stores = list(stores)
        self.reference_scores: Sequence[ScoreTable] | None = None
        self.mismatched: PairCollection | None = None
        self._starts = np.array([0, *itertools.accumulate(len(store) for store in stores)])
        self.members = np.arange(self._starts[-1]) if members is None else members
        self.lengths = np.concatenate([store.lengths for store in self.stores])[self.members]

    @classmethod
    def combine(cls, collections: Sequence[PairCollection], weights: Sequence[float] | None = None) -> PairCollection:
        """Several collections as one.

        Args:
            collections: what to combine, in order.
            weights: shares of the result: the collection that lasts longest is used once, the others are repeated. None takes
                every pair once.
        """
        counts = [len(collection) for collection in collections]
        if weights is not None:
            scale = max(count / weight for count, weight in zip(counts, weights, strict=True))
            counts = [max(1, round(scale * weight)) for weight in weights]
        members, first = [], 0
        for collection, count in zip(collections, counts, strict=True):
            members.append(first + np.resize(collection.members, count))
            first += int(collection._starts[-1])
        return cls([store for collection in collections for store in collection.stores], np.concatenate(members))

    def split(self, held_out_share: float) -> tuple[PairCollection, PairCollection]:
        """(the first pairs, the last ``held_out_share`` of them, at least one), in stored order."""
        first = len(self) - max(1, round(held_out_share * len(self)))
        return PairCollection(self.stores, self.members[:first]), PairCollection(self.stores, self.members[first:])

    def match_anew(self, made: dict[str, MismatchedStore] | None = None) -> None:
        """Make ``mismatched``.

        Args:
            made: by prefix, to be shared by collections of the same data sets; what is missing is added.

        Raises:
            DataError: all prompts of a data set are the same.
        """
        made = {} if made is None else made
        for store in self.stores:
            if store.prefix not in made:
                made[store.prefix] = MismatchedStore(store)
        stores: list[Any] = [made[store.prefix] for store in self.stores]
        self.mismatched = PairCollection(stores, self.members)

    def read_under_reference(self, *, matched: bool) -> list[tuple[Kind, PairCollection]]:
        """What has log-probs under a reference, by kind: these pairs, if ``matched``, and mismatched ones, if there are any."""
        others: list[tuple[Kind, PairCollection]] = [] if self.mismatched is None else [("mismatched", self.mismatched)]
        return [("matched", self), *others] if matched else others

    def scores_of(self, indices: np.ndarray) -> np.ndarray | None:
        """Sums under the reference of (chosen, rejected) of the pairs ``indices``, fp32 ``[P, 2]``; None where none are needed.

        Raises:
            DataError: those of a pair are not there, or not finite.
        """
        if self.reference_scores is None:
            return None
        which, rows = self.rows_of(indices)
        found = np.empty((len(rows), 2), dtype=np.float32)
        for number in np.flatnonzero(np.bincount(which)).tolist():
            here = which == number
            found[here] = self.reference_scores[number][rows[here]]
        unknown = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if unknown.size:
            first = int(unknown[0])
            raise DataError(
                f"{self.describe(int(indices[first]))} has the log-probs {found[first].tolist()} under the reference: not "
                "computed, or damaged. Start again: training computes what is missing on disk; score_reference does for pairs in "
                "memory. All nodes must see the same files."
            )
        return found

    def values_of(self, indices: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """The numbers in ``columns``, which all data sets have, beside the pairs ``indices``: column -> fp32 ``[P]``."""
        located = [self._locate(int(index)) for index in indices] if columns else []
        places = [[store.manifest.pair_columns.index(column) for column in columns] for store in self.stores]
        rows = [self.stores[which].values[row, places[which]] for which, row in located]
        return dict(zip(columns, np.array(rows, dtype=np.float32).reshape(-1, len(columns)).T, strict=True)) if columns else {}

    def __len__(self) -> int:
        return len(self.members)

    def rows_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which data set, which row of it) of the pairs ``indices``, int64 ``[n]`` each."""
        members = self.members[indices]
        which = np.searchsorted(self._starts, members, side="right") - 1
        return which, members - self._starts[which]

    def _locate(self, index: int) -> tuple[int, int]:
        """(which data set, which row of it)."""
        which, row = self.rows_of(np.array([index]))
        return int(which[0]), int(row[0])

    def describe(self, index: int) -> str:
        """Where pair ``index`` can be looked up, for messages."""
        which, row = self._locate(index)
        return f"pair {row} of {self.stores[which].prefix}"

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        which, row = self._locate(index)
        return self.stores[which][row]


# PREFIX of prepared data, several, what is open already, or pairs of token ids in memory.
PairData = str | Sequence[str] | Sequence[IdLists] | PairCollection


def open_pairs(data: PairData) -> PairCollection:
    """The pairs that a program names, as a collection.

    Raises:
        DataError: a data set is missing or incomplete, or pairs in memory are none.
    """
    if isinstance(data, PairCollection):
        return data
    if isinstance(data, str):
        data = [data]
    prefixes = [one for one in data if isinstance(one, str)]
    stores: list[Any] = [PairStore(prefix) for prefix in prefixes] or [PairsInMemory(data)]  # type: ignore[arg-type]
    return PairCollection(stores)
