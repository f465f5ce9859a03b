"""Pairs of token ids that a program has in memory, in the place of a data set on disk.

Shape letter: P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import DataError

# Ids of prompt, chosen and rejected response; a response that is not there is empty.
_Ids = Sequence[int] | npt.NDArray[np.integer]
IdLists = tuple[_Ids, _Ids, _Ids]


class PairsInMemory:
    """What :class:`megatron_rmipo.data.store.pair_store.PairStore` gives of pairs on disk, without numbers beside them.

    Args:
        pairs: token ids, as the model is to see them.
        prefix: stands for the data set in messages.

    Attributes:
        prefix: as given.
        manifest: None: nothing is known of where they come from.
        lengths: int32 ``[P, 3]``: tokens of prompt, chosen, rejected.
        longest: most tokens of a prompt with its longer response.
        most_tokens: no row takes more, in whatever layout: each of two responses behind its prompt.

    Raises:
        DataError: there are none, or one is no three lists of ids, has no prompt, or an id below zero.
    """

    manifest = None

    def __init__(self, pairs: Iterable[IdLists], prefix: str = "the pairs in memory") -> None:
        self.prefix = prefix
        self._pairs = [_read(f"pair {number} of {prefix}", pair) for number, pair in enumerate(pairs)]
        if not self._pairs:
            raise DataError("there are no pairs: give (prompt_ids, chosen_ids, rejected_ids) of at least one.")
        sizes = [[pair.prompt.size, pair.chosen.size, pair.rejected.size] for pair in self._pairs]
        self.lengths = np.array(sizes, dtype=np.int32)
        self.longest = int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).max())
        self.most_tokens = 2 * self.longest

    def __len__(self) -> int:
        return len(self._pairs)

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32 ``[rows, 3]``: tokens of prompt, chosen, rejected."""
        return self.lengths[rows]

    def prompt(self, row: int) -> npt.NDArray[np.integer]:
        """The ids of a row's prompt."""
        return self._pairs[row].prompt

    def __getitem__(self, row: int) -> TokenizedPair:
        return self._pairs[row]


def _read(name: str, pair: IdLists) -> TokenizedPair:
    if len(pair) != 3:
        raise DataError(f"{name} has {len(pair)} parts; (prompt_ids, chosen_ids, rejected_ids) are three.")
    # Of a dict these are its keys.
    parts = [np.asarray(part).reshape(-1) for part in pair]
    for part in parts:
        if part.size and part.dtype.kind not in "iu":
            raise DataError(
                f"{name} holds {part.tolist()[0]!r} where a token id is expected: give the lists (prompt_ids, chosen_ids, "
                "rejected_ids). Text and rows of names are what tools/preprocess_preferences.py reads."
            )
    parts = [part.astype(np.int64) for part in parts]
    if not parts[0].size:
        raise DataError(f"{name} has no prompt: its first token (BOS as a rule) has to be there.")
    least = min(int(part.min()) for part in parts if part.size)
    if least < 0:
        raise DataError(f"{name} has the token id {least}; ids begin at 0.")
    return TokenizedPair(*parts)
