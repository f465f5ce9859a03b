"""More tokens than 32 bits count, in a file that is sparse: between the first pair and the last lie zeros that no disk holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStore, PairStoreWriter, TokenizedPair

GIANT = 1 << 29  # tokens of each part of a giant pair


def pair(*parts: list[int]) -> TokenizedPair:
    return TokenizedPair(*(np.array(part) for part in parts))


def add_giant(writer: PairStoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of zeros through the writer's own bookkeeping; the file is moved on instead of written."""
    builder = writer._builder

    def add_document(_tokens: Any, lengths: list[int]) -> None:
        builder.data_file.seek(sum(lengths) * np.dtype(builder.dtype).itemsize, 1)
        builder.sequence_lengths.extend(lengths)
        builder.document_indices.append(len(builder.sequence_lengths))

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_check", lambda *_: None)
        patched.setattr(builder, "add_document", add_document)
        writer.add_all(np.zeros(1, dtype=np.int32), np.full((1, 3), GIANT))


@pytest.mark.parametrize("vocab_size", [600, 70_000], ids=["2 bytes", "4 bytes"])
def test_pairs_beyond_32_bits_of_tokens_are_read_back(vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = pair([1, 2, 3], [4, 5], [6]), pair([vocab_size - 1, 8], [9], [10, 11, 12])
    manifest = Manifest(TokenizerInfo("made here", vocab_size, None, 0))
    with PairStoreWriter(tmp_path / "out", vocab_size) as writer:
        writer.add(first)
        num_giants = 0
        for limit in (1 << 31, 1 << 32):
            while num_giants * 3 * GIANT < limit:
                add_giant(writer, monkeypatch)
                num_giants += 1
            writer.add(last)
        written = writer.finalize(manifest)
    store = PairStore(tmp_path / "out")
    assert len(store) == written.num_pairs == 3 + num_giants
    assert written.num_tokens == 6 + 2 * 6 + 3 * GIANT * num_giants > 1 << 32
    assert (tmp_path / "out.bin").stat().st_blocks * 512 < 1 << 20 < written.file_bytes["bin"]
    pointers = store._data.index.sequence_pointers
    assert pointers.dtype == np.int64
    assert pointers[-3] == (written.num_tokens - 6) * (2 if vocab_size < 65_500 else 4)
    behind = int(np.flatnonzero(store.lengths[:, 0] == 2)[0])
    collection = PairCollection([store])
    for index, expected in ((0, first), (behind, last), (len(store) - 1, last)):
        for found in (store[index], collection[index]):
            for name, tokens in dataclasses.asdict(expected).items():
                np.testing.assert_array_equal(getattr(found, name), tokens)
