"""The order of runs that were begun before :class:`megatron_rmipo.data.batches.order.PairOrder` had its own; they go on in it."""

from __future__ import annotations

import functools

import numpy as np

from megatron_rmipo.data.batches.order import PairOrder


class PermutedOrder(PairOrder):
    """Every epoch a permutation of all pairs by NumPy's shuffle, which is made whole and kept while it lasts.

    It takes four bytes a pair in each process that asks (eight from 2^31 pairs on), and seconds at the start of an epoch.
    """

    def places(self, number: int, start: int, end: int) -> np.ndarray:
        """As of :meth:`megatron_rmipo.data.batches.order.PairOrder.places`."""
        return _permutation(self.num_pairs, self.seed, number)[start:end].astype(np.int64)


# One epoch ends in a batch in which the next begins.
@functools.lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int, number: int) -> np.ndarray:
    permutation = np.arange(num_pairs, dtype=np.int32 if num_pairs < 1 << 31 else np.int64)
    np.random.default_rng((seed, number)).shuffle(permutation)
    return permutation
