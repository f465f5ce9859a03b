"""In which order a run sees pairs. Pure: the same on every rank, exact over a resume.

A batch costs what its own pairs cost, however many the data has. Runs that earlier versions began have another order, see
:mod:`megatron_rmipo.data.batches.permuted_order`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

# By eight all but the smallest data (five pairs, six) are ordered as evenly as by a shuffle. A run's order depends on it.
_NUM_ROUNDS = 16


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """The order in which a run sees pairs: every epoch a new permutation of all of them.

    The permutation is keyed and never written down: a Feistel network over the cells of a grid that has about as many rows as
    columns and at least a cell for each pair (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Rows and columns
    are moved on in turn by a hash of the other. Less than one row of cells has no pair; who comes to such a cell goes on from it.

    Attributes:
        num_pairs: pairs in the data set.
        seed: of the permutations.
    """

    num_pairs: int
    seed: int

    def epoch(self, number: int) -> np.ndarray:
        """Indices of all pairs in the order of epoch ``number`` (from 0), int64 ``[num_pairs]``."""
        return self.places(number, 0, self.num_pairs)

    def places(self, number: int, start: int, end: int) -> np.ndarray:
        """Indices of the pairs that come at the places ``start`` to ``end`` of epoch ``number``, int64 ``[end - start]``."""
        keys = np.random.SeedSequence((self.seed, number)).generate_state(_NUM_ROUNDS, np.uint64)
        num_columns = math.isqrt(self.num_pairs - 1) + 1
        shape = (-(-self.num_pairs // num_columns), num_columns)
        indices = _permute(np.arange(start, end), keys, shape)
        while (outside := np.flatnonzero(indices >= self.num_pairs)).size:
            indices[outside] = _permute(indices[outside], keys, shape)
        return indices

    def batch(self, consumed_pairs: int, size: int, total_pairs: int) -> np.ndarray:
        """Indices of the next global batch.

        Args:
            consumed_pairs: pairs seen so far in the run; all that the order depends on besides the seed.
            size: global batch size.
            total_pairs: where the run ends; the last batch may be smaller.
        """
        end = min(consumed_pairs + size, total_pairs)
        assert consumed_pairs < end, (consumed_pairs, total_pairs)
        parts = []
        for number in range(consumed_pairs // self.num_pairs, (end - 1) // self.num_pairs + 1):
            first = number * self.num_pairs
            parts.append(self.places(number, max(consumed_pairs - first, 0), min(end - first, self.num_pairs)))
        return np.concatenate(parts)


def _permute(cells: np.ndarray, keys: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where each cell of a grid is moved to, int64; no two to the same."""
    sides = np.array(shape, dtype=np.uint64)
    moved, other = np.divmod(cells.astype(np.uint64), sides[1])
    for number, key in enumerate(keys):
        moved, other = other, (moved + _hash(other, key)) % sides[number % 2]
    rows, columns = (moved, other) if len(keys) % 2 == 0 else (other, moved)
    found: np.ndarray = (rows * sides[1] + columns).astype(np.int64)
    return found


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Below 2^32, so that a sum with it stays exact; the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high: np.ndarray = mixed >> np.uint64(32)
    return high
