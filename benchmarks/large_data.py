"""A prepared data set of any number of pairs: an index of drawn lengths, and tokens that take no space."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo, store_paths

PAIRS_AT_A_TIME = 1_000_000
TOKEN_BYTES, INT32_CODE = 4, 4  # as Megatron's index names them


def make_large_data(folder: Path, num_pairs: int, lengths: np.ndarray, seed: int = 1) -> str:
    """Write a data set whose lengths are drawn from given ones and whose tokens are all zero.

    The index is written a part at a time, the file of tokens is sparse: 60 million pairs take 2.7 GB of disk and little memory.

    Args:
        folder: where; it is there.
        num_pairs: how many.
        lengths: int ``[N, 3]``, prompt, chosen and rejected tokens to draw from.
        seed: of the draw.

    Returns:
        Its prefix.
    """
    prefix = str(folder / f"pairs{num_pairs}")
    paths = store_paths(prefix)
    num_tokens, num_sequences = 0, 3 * num_pairs
    with paths["idx"].open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, INT32_CODE, num_sequences, num_pairs + 1))
        for part in _drawn(num_pairs, lengths, seed):
            part.tofile(index)
        for part in _drawn(num_pairs, lengths, seed):
            ends = num_tokens + part.cumsum(dtype=np.int64)
            ((ends - part.ravel()) * TOKEN_BYTES).tofile(index)
            num_tokens = int(ends[-1])
        for first in range(0, num_pairs + 1, PAIRS_AT_A_TIME):
            (3 * np.arange(first, min(first + PAIRS_AT_A_TIME, num_pairs + 1), dtype=np.int64)).tofile(index)
        # Pages that are not on the disk yet count as written by the process that maps them.
        os.fsync(index)
    with paths["bin"].open("wb") as tokens:
        tokens.truncate(num_tokens * TOKEN_BYTES)
    manifest = Manifest(
        TokenizerInfo("made up", 128256, 128000, 128001),
        num_pairs=num_pairs,
        num_tokens=num_tokens,
        file_bytes={kind: paths[kind].stat().st_size for kind in ("bin", "idx")},
    )
    paths["json"].write_text(manifest.to_json(), encoding="utf-8")
    return prefix


def _drawn(num_pairs: int, lengths: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The lengths of all pairs, int32 ``[part, 3]`` at a time, the same at every call."""
    rng = np.random.default_rng(seed)
    for first in range(0, num_pairs, PAIRS_AT_A_TIME):
        count = min(PAIRS_AT_A_TIME, num_pairs - first)
        yield lengths[rng.integers(len(lengths), size=count)].astype(np.int32)
