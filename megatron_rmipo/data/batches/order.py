"""In which order a run sees pairs. Pure: the same on every rank, exact over a resume."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """The order in which a run sees pairs: every epoch a new permutation of all of them.

    Attributes:
        num_pairs: pairs in the data set.
        seed: of the permutations.
    """

    num_pairs: int
    seed: int

    def epoch(self, number: int) -> np.ndarray:
        """Indices of all pairs in the order of epoch ``number`` (from 0), int64 ``[num_pairs]``."""
        return np.random.default_rng((self.seed, number)).permutation(self.num_pairs)

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
            parts.append(self.epoch(number)[max(consumed_pairs - first, 0) : end - first])
        return np.concatenate(parts)
