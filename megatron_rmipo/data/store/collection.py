"""Pairs of one or more prepared data sets under one numbering, with what a reference said of them.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_rmipo.data.store.chunks import row_ranges
from megatron_rmipo.data.store.in_memory import IdLists, PairsInMemory
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.data.store.reference_scores import Kind, ScoreTable
from megatron_rmipo.errors import DataError


@dataclasses.dataclass(frozen=True)
class Span:
    """Pairs that stand together, over and over: what says which pairs a collection has, however many they are.

    Attributes:
        first: the first of them, numbered through all data sets one after the other.
        size: how many they are.
        count: how many members of the collection they make: from ``begin`` on, behind the last comes the first again.
        begin: which of them is the first member.
    """

    first: int
    size: int
    count: int
    begin: int = 0

    def part(self, start: int, end: int) -> Span:
        """Its members ``start`` to ``end``."""
        return Span(self.first, self.size, end - start, (self.begin + start) % self.size)

    def moved(self, by: int) -> Span:
        """The same behind other data sets."""
        return dataclasses.replace(self, first=self.first + by)


class PairCollection(Sequence[TokenizedPair]):
    """Pairs of one or more prepared data sets under one numbering.

    Args:
        stores: the data sets.
        spans: which pairs; None for all.

    Attributes:
        stores, spans: as given, without empty spans.
        reference_scores: of each data set's rows, see :mod:`megatron_rmipo.data.store.reference_scores`; None where not needed.
        mismatched: the same prompts with responses of other rows; None where not needed.
    """

    def __init__(self, stores: Sequence[PairStore], spans: Sequence[Span] | None = None) -> None:
        self.stores: list[Any] = list(stores)
        self.reference_scores: Sequence[ScoreTable] | None = None
        self.mismatched: PairCollection | None = None
        self._starts = np.array([0, *itertools.accumulate(len(store) for store in stores)])
        total = int(self._starts[-1])
        self.spans = [span for span in ([Span(0, total, total)] if spans is None else spans) if span.count]
        # A row a span.
        self._table = np.array([[one.first, one.size, one.begin] for one in self.spans], dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum([one.count for one in self.spans], dtype=np.int64)

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
        spans: list[Span] = []
        first = 0
        for collection, count in zip(collections, counts, strict=True):
            spans += [span.moved(first) for span in collection._repeated(count)]
            first += int(collection._starts[-1])
        return cls([store for collection in collections for store in collection.stores], spans)

    def _repeated(self, count: int) -> list[Span]:
        """So many members, the first again behind the last."""
        if len(self.spans) == 1 and (one := self.spans[0]).begin + one.count <= one.size:
            return [Span(one.first + one.begin, one.count, count)]
        rounds, rest = divmod(count, len(self))
        return self.spans * rounds + self._part(0, rest)

    def _part(self, start: int, end: int) -> list[Span]:
        """The spans of the members ``start`` to ``end``."""
        found, first = [], 0
        for span in self.spans:
            low, high = max(start - first, 0), min(end - first, span.count)
            if low < high:
                found.append(span.part(low, high))
            first += span.count
        return found

    def split(self, held_out_share: float) -> tuple[PairCollection, PairCollection]:
        """(the first pairs, the last ``held_out_share`` of them, at least one), in stored order."""
        first = len(self) - max(1, round(held_out_share * len(self)))
        return PairCollection(self.stores, self._part(0, first)), PairCollection(self.stores, self._part(first, len(self)))

    def distinct(self) -> PairCollection:
        """The same pairs, each once, in stored order."""
        ranges: list[list[int]] = []
        taken = [(span.first, span.begin, min(span.count, span.size), span.size) for span in self.spans]
        parts = [(first + begin, first + min(begin + count, size)) for first, begin, count, size in taken]
        parts += [(first, first + begin + count - size) for first, begin, count, size in taken if begin + count > size]
        for start, end in sorted(parts):
            if ranges and start <= ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], end)
            else:
                ranges.append([start, end])
        return PairCollection(self.stores, [Span(start, end - start, end - start) for start, end in ranges])

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
        self.mismatched = PairCollection(stores, self.spans)

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
        for number in np.unique(which).tolist():
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
        if not columns:
            return {}
        which, rows = self.rows_of(indices)
        found = np.empty((len(rows), len(columns)), dtype=np.float32)
        for number in np.unique(which).tolist():
            here, store = which == number, self.stores[number]
            found[here] = store.values[rows[here]][:, [store.manifest.pair_columns.index(column) for column in columns]]
        return dict(zip(columns, found.T, strict=True))

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of prompt, chosen, rejected of the pairs ``indices``, int32 ``[P, 3]``."""
        return self._lengths(self.members_of(indices))

    def _lengths(self, members: np.ndarray) -> np.ndarray:
        if len(self.stores) == 1:
            alone: np.ndarray = self.stores[0].lengths_of(members)
            return alone
        which, rows = self._rows(members)
        found = np.empty((len(rows), 3), dtype=np.int32)
        for number in np.unique(which).tolist():
            here = which == number
            found[here] = self.stores[number].lengths_of(rows[here])
        return found

    def all_lengths(self, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Lengths of all pairs, or of those before ``end``, a few thousand at a time: (the first of them, int32 ``[P, 3]``)."""
        for first, members in self.all_members(end):
            yield first, self._lengths(members)

    def all_members(self, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """As of :meth:`members_of` of all pairs, or of those before ``end``, in pieces: (the first of them, numbers)."""
        first = 0
        for span in self._part(0, len(self) if end is None else end):
            for start, stop in row_ranges(span.count):
                at = (span.begin + start) % span.size
                numbers = np.arange(at, at + stop - start)
                if numbers[-1] >= span.size:
                    numbers %= span.size
                yield first + start, span.first + numbers
            first += span.count

    def mean_chosen_length(self, end: int | None = None) -> float:
        """Chosen tokens of a pair, over all pairs or those before ``end``."""
        return sum(int(part[:, 1].sum(dtype=np.int64)) for _, part in self.all_lengths(end)) / (len(self) if end is None else end)

    def members_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the pairs ``indices`` through the data sets one after the other, int64 ``[P]``."""
        indices = np.asarray(indices, dtype=np.int64)
        spans = np.searchsorted(self._ends, indices, side="right")
        first, size, begin = self._table[spans].T
        starts = np.concatenate([[0], self._ends])[spans]
        members: np.ndarray = first + (begin + indices - starts) % size
        return members

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.spans else 0

    def rows_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which data set, which row of it) of the pairs ``indices``, int64 ``[n]`` each."""
        return self._rows(self.members_of(indices))

    def _rows(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which = np.searchsorted(self._starts, members, side="right") - 1
        return which, members - self._starts[which]

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        which, row = self.rows_of(np.array([index % len(self)]))
        return int(which[0]), int(row[0])

    def describe(self, index: int) -> str:
        """Where pair ``index`` can be looked up, for messages."""
        which, row = self._locate(index)
        return f"pair {row} of {self.stores[which].prefix}"

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        which, row = self._locate(index)
        pair: TokenizedPair = self.stores[which][row]
        return pair


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
