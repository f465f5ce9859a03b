"""Pairs of token ids that a program has in memory, in the place of a data set on disk.

Shape letter: P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import DataError

# Ids of prompt, chosen and rejected response; a response that is not there is empty.
IdLists = tuple[Sequence[int], Sequence[int], Sequence[int]]


class PairsInMemory:
    """What :class:`megatron_rmipo.data.store.pair_store.PairStore` gives of pairs on disk, without numbers beside them.

    Args:
        pairs: token ids, as the model is to see them.

    Attributes:
        prefix: stands for the data set in messages.
        manifest: none.
        lengths: int32 ``[P, 3]``: tokens of prompt, chosen, rejected.

    Raises:
        DataError: there are none, or one has no three parts, no prompt, or an id below zero.
    """

    prefix = "the pairs in memory"
    manifest = None

    def __init__(self, pairs: Iterable[IdLists]) -> None:
        self._pairs = [_read(number, pair) for number, pair in enumerate(pairs)]
        if not self._pairs:
            raise DataError("there are no pairs: give (prompt_ids, chosen_ids, rejected_ids) of at least one.")
        sizes = [[pair.prompt.size, pair.chosen.size, pair.rejected.size] for pair in self._pairs]
        self.lengths = np.array(sizes, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, row: int) -> TokenizedPair:
        return self._pairs[row]


def _read(number: int, pair: IdLists) -> TokenizedPair:
    if len(pair) != 3:
        raise DataError(f"pair {number} in memory has {len(pair)} parts; (prompt_ids, chosen_ids, rejected_ids) are three.")
    parts = [np.asarray(part, dtype=np.int64).reshape(-1) for part in pair]
    if not parts[0].size:
        raise DataError(f"pair {number} in memory has no prompt: its first token (BOS as a rule) has to be there.")
    least = min(int(part.min()) for part in parts if part.size)
    if least < 0:
        raise DataError(f"pair {number} in memory has the token id {least}; ids begin at 0.")
    return TokenizedPair(*parts)
