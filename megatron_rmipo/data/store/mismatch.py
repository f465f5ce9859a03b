"""Mismatched pairs: each prompt with the responses of another row, the same one in every epoch.

KTO measures with them how far the policy has moved from its reference (Ethayarajh et al. 2024, section 4.1). Which rows go
together depends on the stored order alone, so that log-probs under the reference can be computed once.

Shape letter: P rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.errors import DataError


class MismatchedStore:
    """A data set whose prompts have the responses of other rows, to be used in the place of the data set itself.

    A response that would make a pair longer than the longest row of the data set is cut at its end.

    Args:
        store: the data set.

    Attributes:
        prefix, manifest: those of the data set.
        partners: int64 ``[P]``, see :func:`find_partners`.
        lengths: int32 ``[P, 3]``: tokens of prompt, chosen, rejected.

    Raises:
        DataError: all prompts are the same.
    """

    def __init__(self, store: PairStore) -> None:
        self.prefix = store.prefix
        self.manifest = store.manifest
        self.partners = find_partners(store)
        self._store = store
        prompts = store.lengths[:, :1]
        longest = (prompts[:, 0] + store.lengths[:, 1:].max(axis=1)).max()
        self.lengths = np.concatenate([prompts, np.minimum(store.lengths[self.partners, 1:], longest - prompts)], axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenizedPair:
        other = self._store[int(self.partners[row])]
        _, chosen, rejected = self.lengths[row]
        return TokenizedPair(self._store[row].prompt, other.chosen[:chosen], other.rejected[:rejected])


def find_partners(store: PairStore) -> npt.NDArray[np.int64]:
    """For each row the row whose responses its prompt is matched with: one that follows it, with another prompt.

    Rows that stand together with one prompt (as unpaired data often does) take the rows with the next prompt in turn; the last
    ones go on with the first.

    Returns:
        int64 ``[P]``.

    Raises:
        DataError: all prompts are the same.
    """
    num_rows = len(store)
    prompt_lengths = store.lengths[:, 0]
    # Prompts of different lengths differ; only the others are read.
    starts_group = prompt_lengths != np.roll(prompt_lengths, 1)
    for row in np.flatnonzero(~starts_group).tolist():
        starts_group[row] = not np.array_equal(store[row].prompt, store[row - 1].prompt)
    starts = np.flatnonzero(starts_group)
    if not starts.size:
        raise DataError(
            f"{store.prefix}: all {num_rows} prompts are the same, so no response can be matched with another prompt, which "
            "--objective kto needs. Use data with several prompts."
        )
    rows = np.arange(num_rows)
    # The last group may go on at row 0.
    group = (np.searchsorted(starts, rows, side="right") - 1) % starts.size
    following = (group + 1) % starts.size
    sizes = (np.roll(starts, -1) - starts) % num_rows
    offset = (rows - starts[group]) % num_rows
    partners: npt.NDArray[np.int64] = (starts[following] + offset % sizes[following]) % num_rows
    return partners
