"""``PREFIX.idx`` of a data set, mapped into memory: checked once, a piece at a time, and read where it is asked.

Shape letter: P pairs.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.chunks import row_ranges
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.errors import DataError

SEQUENCES_PER_PAIR = 3
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, documents with a leading zero


class PairIndex:
    """The index of a finished data set.

    Its pages are those of the file, which processes share. What is read of them stays valid after the index is gone.

    Args:
        path: the file, of the size that the manifest says.
        manifest: of the data set.

    Attributes:
        lengths: int32 ``[P, 3]``, mapped: tokens of prompt, chosen, rejected.

    Raises:
        DataError: it is none of such data, or does not belong to the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        num_pairs = manifest.num_pairs
        num_sequences = SEQUENCES_PER_PAIR * num_pairs
        self._check_header()
        self.lengths: npt.NDArray[np.int32] = self._map(np.int32, _HEADER.size, (num_pairs, SEQUENCES_PER_PAIR))
        # Between lengths and documents stands where each sequence begins.
        behind = _HEADER.size + num_sequences * (np.dtype(np.int32).itemsize + np.dtype(np.int64).itemsize)
        self._documents: npt.NDArray[np.int64] = self._map(np.int64, behind, (num_pairs + 1,))

    def _check_header(self) -> None:
        num_pairs = self._manifest.num_pairs
        with open(self._path, "rb") as stream:
            header = stream.read(_HEADER.size)
            num_bytes = stream.seek(0, os.SEEK_END)
        # Checked here, since Megatron's reader leaves half-made objects behind when it stops at a bad header.
        expected = (b"MMIDIDX\0\0", 1, SEQUENCES_PER_PAIR * num_pairs, num_pairs + 1)
        magic, version, _, *counts = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        needed = _HEADER.size + SEQUENCES_PER_PAIR * num_pairs * (4 + 8) + (num_pairs + 1) * 8
        if (magic, version, *counts) != expected or num_bytes < needed:
            raise DataError(
                f"{self._path}: not a Megatron index of {num_pairs} pairs of three sequences. "
                "Copy all files of one run, or preprocess again."
            )

    def _map(self, dtype: type[np.generic], offset: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if not shape[0]:
            return np.empty(shape, dtype=dtype)
        # As a plain array: each slice of a memmap costs as much as the work on it.
        return np.asarray(np.memmap(self._path, dtype=dtype, mode="r", offset=offset, shape=shape))

    def check(self, bytes_per_id: int) -> int:
        """Read all of it once.

        Args:
            bytes_per_id: of the ``bin`` file.

        Returns:
            Most tokens of a prompt with its longer response; 0 without pairs.

        Raises:
            DataError: it describes other files, or rows without a prompt or the responses that the manifest says they have.
        """
        num_tokens = longest = 0
        fits, odd_row = True, None
        for first, end in row_ranges(len(self._documents)):
            expected = np.arange(SEQUENCES_PER_PAIR * first, SEQUENCES_PER_PAIR * end, SEQUENCES_PER_PAIR)
            fits = fits and np.array_equal(self._documents[first:end], expected)
        for first, end in row_ranges(len(self.lengths)):
            prompt, chosen, rejected = columns = self.lengths[first:end].T.copy()
            num_tokens += int(columns.sum(dtype=np.int64))
            longest = max(longest, int((prompt + np.maximum(chosen, rejected)).max()))
            agrees = (prompt > 0) & self._have_responses(chosen > 0, rejected > 0)
            if odd_row is None and not agrees.all():
                odd_row = first + int(agrees.argmin())
        if not fits or num_tokens * bytes_per_id != self._manifest.file_bytes["bin"]:
            raise DataError(
                f"{self._path}: does not describe {len(self.lengths)} pairs of three sequences in "
                f"{self._path.with_suffix('.bin').name}: the files are from different runs. Preprocess again."
            )
        if odd_row is not None:
            num_prompt, num_chosen, num_rejected = self.lengths[odd_row]
            raise DataError(
                f"{self._path.with_suffix('.json')}: holds {self._manifest.kind}, but by {self._path.name} row {odd_row} has "
                f"{num_chosen} chosen and {num_rejected} rejected tokens behind {num_prompt} of a prompt: the files are from "
                "different runs. Preprocess again."
            )
        return longest

    def _have_responses(self, chosen: npt.NDArray[np.bool_], rejected: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether rows that have such responses are of the kind that the manifest says."""
        is_whole = chosen & (rejected == self._manifest.has_rejected)
        agrees: npt.NDArray[np.bool_] = chosen != rejected if self._manifest.unpaired else is_whole
        return agrees
