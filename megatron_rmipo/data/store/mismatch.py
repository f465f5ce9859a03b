"""Mismatched pairs: each prompt with the responses of another row, the same one in every epoch.

KTO measures with them how far the policy has moved from its reference (Ethayarajh et al. 2024, section 4.1). Which rows go
together depends on the stored order alone, so that log-probs under the reference can be computed once. A row's partner is found
from the rows around it.

Shape letter: P rows.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.errors import DataError

# Groups of at least so many rows are kept once they were found: few can be so large.
_LARGE_GROUP = 1024


class MismatchedStore:
    """A data set whose prompts have the responses of other rows, to be used in the place of the data set itself.

    A response that would make a pair longer than the longest row of the data set is cut at its end.

    Args:
        store: the data set.

    Attributes:
        prefix, manifest, longest, most_tokens: those of the data set.

    Raises:
        DataError: all prompts are the same.
    """

    def __init__(self, store: PairStore) -> None:
        self.prefix = store.prefix
        self.manifest = store.manifest
        self.longest = store.longest
        self._store = store
        self.most_tokens = store.most_tokens
        self._groups = PromptGroups(store)

    def __len__(self) -> int:
        return len(self._store)

    def partners_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows whose responses the prompts of ``rows`` are matched with: ones that follow, with another prompt.

        Rows that stand together with one prompt (as unpaired data often does) take the rows with the next prompt in turn; the
        last ones go on with the first.
        """
        return np.array([self._partner(row) for row in rows.tolist()], dtype=np.int64)

    def _partner(self, row: int) -> int:
        start, size = self._groups.of(row)
        following, count = self._groups.of((start + size) % len(self))
        return (following + (row - start) % len(self) % count) % len(self)

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32 ``[rows, 3]``: tokens of prompt, chosen, rejected."""
        prompts = self._store.lengths_of(rows)[:, :1]
        responses = self._store.lengths_of(self.partners_of(rows))[:, 1:]
        return np.concatenate([prompts, np.minimum(responses, self.longest - prompts)], axis=1)

    def __getitem__(self, row: int) -> TokenizedPair:
        prompt, other = self._store[row].prompt, self._store[self._partner(row)]
        room = self.longest - prompt.size
        return TokenizedPair(prompt, other.chosen[:room], other.rejected[:room])


class PromptGroups:
    """Rows of a data set that stand together with one prompt; the last group may go on at row 0.

    Args:
        store: the data set.

    Raises:
        DataError: all prompts are the same.
    """

    def __init__(self, store: PairStore) -> None:
        self._store, self._num_rows = store, len(store)
        self._large: list[tuple[int, int]] = []
        if self._rows_alike(0, 1) == self._num_rows:
            raise DataError(
                f"{store.prefix}: all {self._num_rows} prompts are the same, so no response can be matched with another prompt, "
                "which --objective kto needs. Use data with several prompts."
            )

    def of(self, row: int) -> tuple[int, int]:
        """(first row, number of rows) of the group of a row."""
        for known in (row, row + self._num_rows):
            start, size = self._large[place - 1] if (place := bisect.bisect(self._large, (known, self._num_rows))) else (0, 0)
            if start <= known < start + size:
                return start, size
        before, after = self._rows_alike(row, -1), self._rows_alike(row, 1)
        group = (row - before) % self._num_rows, before + 1 + after
        if group[1] >= _LARGE_GROUP:
            bisect.insort(self._large, group)
        return group

    def _rows_alike(self, row: int, step: int) -> int:
        """How many rows behind (``step`` 1) or before (-1) a row have its prompt; P: all have it, the row again among them."""
        prompt, count, size = self._store.prompt(row), 0, 8
        while count < self._num_rows:
            # Prompts of different lengths differ; only the others are read. Where there are many, more are looked at together.
            rows = (row + step * np.arange(count + 1, min(count + size, self._num_rows) + 1)) % self._num_rows
            differ = self._store.lengths_of(rows)[:, 0] != prompt.size
            alike = rows[: int(differ.argmax()) if differ.any() else len(rows)].tolist()
            for other in alike:
                if not np.array_equal(self._store.prompt(other), prompt):
                    return count
                count += 1
            if len(alike) < len(rows):
                return count
            size = min(2 * size, 1 << 14)
        return count
