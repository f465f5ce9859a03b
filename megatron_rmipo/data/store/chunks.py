"""Walks over what there is of every pair, a piece at a time, so that no copy of all of it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Lengths of so many stay in a processor's cache while they are looked at.
ROWS_AT_A_TIME = 1 << 14


def row_ranges(num_rows: int, size: int = ROWS_AT_A_TIME) -> Iterator[tuple[int, int]]:
    """(first, end) of pieces of at most ``size`` rows, in order."""
    for first in range(0, num_rows, size):
        yield first, min(first + size, num_rows)


def digest_rows(array: npt.NDArray[np.generic]) -> str:
    """sha256, in hex, of an array's bytes in C order."""
    digest = hashlib.sha256()
    for first, end in row_ranges(len(array)):
        digest.update(np.ascontiguousarray(array[first:end]).data)
    return digest.hexdigest()
