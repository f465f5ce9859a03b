"""The lengths of the pairs that a plan is made for.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError

_COLUMNS = ("prompt", "chosen", "rejected")
# Lengths of so many pairs stand for those of all.
MOST_PAIRS = 100_000


@dataclasses.dataclass(frozen=True)
class PairLengths:
    """Lengths in the place of pairs, for batches of which no token is read.

    Attributes:
        name: where they are from.
        lengths: int64 ``[P, 3]``: prompt, chosen and rejected tokens.
        num_pairs: pairs of an epoch, of which these are a sample.
        mismatched: those of each prompt with the responses of another; None where not needed.
        num_cut: how many were longer than allowed.
    """

    name: str
    lengths: np.ndarray
    num_pairs: int
    mismatched: PairLengths | None = None
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Int64 ``[rows, 3]``."""
        found: np.ndarray = self.lengths[rows]
        return found

    def batch(self, size: int) -> np.ndarray:
        """Rows of a global batch, int64 ``[size]``, in the order of a run."""
        return PairOrder(len(self), seed=0).batch(0, size, size)

    def shortened(self, seq_length: int) -> PairLengths:
        """With the pairs cut, as preparing them does, that a sequence of so many tokens does not hold: prompts first."""
        responses = np.minimum(self.lengths[:, 1:], seq_length - 1)
        prompts = np.minimum(self.lengths[:, 0], seq_length - responses.max(axis=1))
        kept = np.column_stack([prompts, responses])
        return dataclasses.replace(self, lengths=kept, num_cut=int((kept != self.lengths).any(axis=1).sum()))

    def with_mismatched(self) -> PairLengths:
        """With each prompt beside the responses of the pair before it, too."""
        others = np.column_stack([self.lengths[:, :1], np.roll(self.lengths[:, 1:], 1, axis=0)])
        return dataclasses.replace(self, mismatched=dataclasses.replace(self, lengths=others))

    def __str__(self) -> str:
        prompt, chosen, rejected = self.lengths.mean(axis=0)
        cut = f", {self.num_cut} of {len(self)} shortened" if self.num_cut else ""
        return f"{self.name}: {self.num_pairs:,} pairs an epoch, mean {prompt:.0f} + {chosen:.0f} / {rejected:.0f} tokens{cut}"


def equal_lengths(text: str, num_pairs: int) -> PairLengths:
    """Pairs of ``PROMPT,CHOSEN,REJECTED`` tokens, all of them alike.

    Raises:
        ConfigError: these are not three whole numbers above 0.
    """
    numbers = text.split(",")
    if len(numbers) != len(_COLUMNS) or not all(number.isdecimal() and int(number) for number in numbers):
        raise ConfigError(
            f"--lengths {text}: three whole numbers above 0 are needed, prompt,chosen,rejected tokens as 200,300,300."
        )
    return PairLengths(f"--lengths {text}", np.array([[int(number) for number in numbers]], dtype=np.int64), num_pairs)


def read_lengths(name: str, num_pairs: int | None = None) -> PairLengths:
    """Of a prepared data set, or of a CSV file with a line a pair and the columns prompt, chosen, rejected.

    Args:
        name: the data set's prefix, or the file, which ends in ``.csv``.
        num_pairs: of an epoch; None: those that there are.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    if name.endswith(".csv"):
        lengths = _read_csv(Path(name))
    else:
        store = PairStore(name.removesuffix(".bin").removesuffix(".idx").removesuffix(".json"))
        if len(store):
            return dataclasses.replace(of_collection(PairCollection([store])), num_pairs=num_pairs or len(store))
        lengths = np.empty((0, len(_COLUMNS)), dtype=np.int64)
    if not len(lengths):
        raise DataError(f"{name} holds no pair.")
    return PairLengths(name, lengths, num_pairs or len(lengths))


def of_collection(pairs: PairCollection) -> PairLengths:
    """Of the pairs of a run, in their order; of many pairs those of the first ones."""
    lengths = pairs.lengths_of(np.arange(min(len(pairs), MOST_PAIRS)))
    name = ", ".join(store.prefix for store in pairs.stores)
    return PairLengths(name, np.asarray(lengths, dtype=np.int64), len(pairs))


def _read_csv(path: Path) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path} cannot be read: {error}") from error
    if not lines or tuple(lines[0].split(",")) != _COLUMNS:
        raise DataError(f"{path}:1: the first line must be {','.join(_COLUMNS)}, the tokens of a pair's parts.")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        values = line.split(",")
        if len(values) != len(_COLUMNS) or not all(value.isdecimal() and int(value) for value in values):
            raise DataError(f"{path}:{number}: {line!r} is not three whole numbers above 0.")
        rows.append([int(value) for value in values])
    return np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS))
