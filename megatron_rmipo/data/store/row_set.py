"""Some rows of a data set, as a bit each: 7.5 MB for 60 M rows, whichever they are.

Shape letter: P rows of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Of the bits that are looked at together: 2 MB of row numbers at most.
_BYTES = 1 << 15
_NUM_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)


class RowSet:
    """Some rows of a data set.

    Args:
        num_rows: P.
        bits: uint8 ``[ceil(P / 8)]``, row r at bit ``r % 8`` of byte ``r // 8``, counted from the lowest; those beyond P are 0.
            None: no row.
    """

    def __init__(self, num_rows: int, bits: npt.NDArray[np.uint8] | None = None) -> None:
        self.num_rows = num_rows
        self.bits = np.zeros(-(-num_rows // 8), dtype=np.uint8) if bits is None else bits
        assert self.bits.shape == (-(-num_rows // 8),), (self.bits.shape, num_rows)

    @classmethod
    def whole(cls, num_rows: int) -> RowSet:
        """All rows."""
        bits = np.full(-(-num_rows // 8), 255, dtype=np.uint8)
        if num_rows % 8:
            bits[-1] = (1 << num_rows % 8) - 1
        return cls(num_rows, bits)

    def add(self, rows: npt.NDArray[np.int64]) -> None:
        """Take in ``rows``, int64 ``[n]``, in any order and any number of times."""
        np.bitwise_or.at(self.bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))

    def __and__(self, other: RowSet) -> RowSet:
        """The rows that are in both."""
        return RowSet(self.num_rows, self.bits & other.bits)

    def __len__(self) -> int:
        """How many rows are in it."""
        parts = (self.bits[first : first + _BYTES] for first in range(0, len(self.bits), _BYTES))
        return sum(int(_NUM_ONES[part].sum()) for part in parts)

    def blocks(self, size: int) -> Iterator[npt.NDArray[np.int64]]:
        """The rows, ascending, int64, ``size`` at a time and what is left at the end."""
        waiting = np.empty(0, dtype=np.int64)
        for first in range(0, len(self.bits), _BYTES):
            part = np.unpackbits(self.bits[first : first + _BYTES], bitorder="little")
            waiting = np.concatenate([waiting, np.flatnonzero(part) + 8 * first])
            end = len(waiting) - len(waiting) % size
            yield from np.split(waiting[:end], end // size) if end else ()
            waiting = waiting[end:]
        if waiting.size:
            yield waiting
