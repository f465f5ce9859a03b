"""Tokenized preference pairs on disk: Megatron's IndexedDataset with a document per pair, and a manifest beside it.

``PREFIX.bin`` and ``PREFIX.idx`` hold, for each pair, one document of three sequences: prompt, chosen, rejected. Supervised data
have the same form with the rejected sequence empty, in every document; unpaired data with one of the two responses empty, by the
row's label. ``PREFIX.values.npy`` holds the numbers that stand beside each pair, fp32 ``[pairs, columns]``, where the rows have
such columns. ``PREFIX.json`` (the manifest) says with which tokenizer and template they were made and what was left out. It is
written last: a data set without a manifest was never finished and is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.chunks import digest_rows, row_ranges
from megatron_rmipo.data.store.disk import write_errors_named
from megatron_rmipo.data.store.file_digests import HashedStream, digest_of
from megatron_rmipo.data.store.manifest import PARTS, Manifest, TokenizerInfo, store_paths, summarize_lengths
from megatron_rmipo.data.store.pair_index import SEQUENCES_PER_PAIR, PairIndex
from megatron_rmipo.errors import DataError

__all__ = [
    "PARTS",
    "Manifest",
    "PairStore",
    "PairStoreWriter",
    "TokenizedPair",
    "TokenizerInfo",
    "check_output_prefix",
    "store_paths",
]


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids, int64 ``[length]`` each.

    The prompt has at least one token and starts with BOS where the tokenizer has one; each response has at least one token and
    ends with EOS or the template's end-of-turn token. (Truncation by ``--overlong official`` can cost BOS and EOS.) A response
    that the row does not have is an empty array: the rejected one in supervised data, one of the two in unpaired data.
    """

    prompt: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]
    rejected: npt.NDArray[np.int64]


def _indexed_dataset() -> ModuleType:
    """Megatron's module, imported when needed (seconds), without its remarks on GPU libraries that data do not use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


class PairStoreWriter:
    """Write a data set. A context manager: leaving it without :meth:`finalize` removes what was written.

    The files grow under ``PREFIX.incomplete.*`` names and are renamed when whole, the manifest last.

    Args:
        prefix: path without extension. Its folder is made if missing.
        vocab_size: decides the integer type of the ids (uint16 below 65,500, else int32).
        unpaired: every row has a chosen or a rejected response, not both.
        columns: names of the numbers that stand beside each pair.
        overwrite: replace a data set that stands at the prefix.

    Raises:
        DataError: files stand at the prefix and ``overwrite`` is off, or it cannot be written.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int,
        *,
        unpaired: bool = False,
        columns: Sequence[str] = (),
        overwrite: bool = False,
    ) -> None:
        indexed_dataset = _indexed_dataset()
        self.prefix = str(prefix)
        self._paths = store_paths(self.prefix)
        self._partial = store_paths(f"{self.prefix}.incomplete")
        check_output_prefix(self.prefix, overwrite=overwrite)
        self._lengths: list[int] = []
        self._columns, self._values = list(columns), [np.empty((0, len(columns)), dtype=np.float32)]
        self._first_tokens: set[int] = set()
        self._vocab_size, self._unpaired = vocab_size, unpaired
        self._finished = False
        with write_errors_named(self.prefix):
            self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
            dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
            self._builder = indexed_dataset.IndexedDatasetBuilder(str(self._partial["bin"]), dtype=dtype)
        self._hashed = self._builder.data_file = HashedStream(self._builder.data_file)

    def __enter__(self) -> PairStoreWriter:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._finished:
            self.abandon()

    def __len__(self) -> int:
        """Pairs added so far."""
        return len(self._lengths) // SEQUENCES_PER_PAIR

    def add(self, pair: TokenizedPair, values: Sequence[float] = ()) -> None:
        """Append one pair, with the numbers beside it in the order of the columns."""
        parts = (pair.prompt, pair.chosen, pair.rejected)
        beside = np.array([values], dtype=np.float32)
        self.add_all(np.concatenate(parts), np.array([[len(part) for part in parts]]), beside)

    def add_all(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], values: npt.NDArray[np.float32] | None = None) -> None:
        """Append any number of pairs.

        Args:
            tokens: integers, prompt, chosen and rejected of each pair behind one another.
            lengths: their lengths, integers ``[pairs, 3]``.
            values: the numbers beside them, fp32 ``[pairs, columns]``, all finite; None where there are no columns.
        """
        if not lengths.size:
            return
        assert lengths.shape[1:] == (SEQUENCES_PER_PAIR,), lengths.shape
        self._check(tokens, lengths)
        if values is None:
            values = np.empty((len(lengths), 0), dtype=np.float32)
        assert values.shape == (len(lengths), len(self._columns)), (values.shape, self._columns)
        assert np.isfinite(values).all(), "a number that is not finite"
        self._values.append(values)
        flat = lengths.ravel().tolist()
        with write_errors_named(self.prefix):
            self._builder.add_document(tokens, flat)
        # Megatron's builder took them for one document; each pair is one.
        documents = self._builder.document_indices
        end = documents.pop()
        documents.extend(range(documents[-1] + SEQUENCES_PER_PAIR, end + 1, SEQUENCES_PER_PAIR))
        self._lengths.extend(flat)
        starts = np.concatenate([[0], lengths.sum(axis=1).cumsum()[:-1]])
        self._first_tokens.update(np.unique(tokens[starts]).tolist())

    def _check(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        prompt, chosen, rejected = lengths.T
        _assert_none(lengths.min(axis=1) < 0, lengths, "a negative length")
        _assert_none(prompt == 0, lengths, "no prompt")
        if self._unpaired:
            _assert_none((chosen == 0) == (rejected == 0), lengths, "an unpaired row has one response")
        else:
            _assert_none(chosen == 0, lengths, "no chosen response")
            has_rejected = (self._lengths[2] if self._lengths else rejected[0]) > 0
            _assert_none((rejected > 0) != has_rejected, lengths, "pairs and supervised rows in one data set")
        assert lengths.sum() == len(tokens), (lengths.sum(), len(tokens))
        assert tokens.min() >= 0, tokens.min()
        assert tokens.max() < self._vocab_size, (tokens.max(), self._vocab_size)

    def finalize(self, manifest: Manifest, keep_beside: Callable[[], None] | None = None) -> Manifest:
        """Write the index, rename all files into place and the manifest last.

        Args:
            manifest: what is known of the data set.
            keep_beside: puts into place what stands beside the files, before the manifest says that all is there.

        Returns:
            The manifest as written, with counts, lengths and file sizes.

        Raises:
            DataError: there are no pairs, or the disk failed.
        """
        if not self._lengths:
            self.abandon()
            raise DataError(f"{self.prefix}: no pairs to write.")
        lengths = np.array(self._lengths, dtype=np.int32).reshape(-1, SEQUENCES_PER_PAIR)
        num_chosen, num_rejected = (lengths[:, 1:] > 0).sum(axis=0).tolist()
        by_label = {"desirable": num_chosen, "undesirable": num_rejected} if self._unpaired else {}
        try:
            with write_errors_named(self.prefix):
                self._builder.finalize(str(self._partial["idx"]))
                if self._columns:
                    np.save(self._partial["values"], np.concatenate(self._values))
                manifest = dataclasses.replace(manifest, pair_columns=self._columns)
                digests = {"bin": self._hashed.digest_of(self._partial["bin"]), "idx": digest_of(self._partial["idx"])}
                complete = dataclasses.replace(
                    manifest,
                    counts={**manifest.counts, **by_label},
                    has_rejected=self._unpaired or num_rejected > 0,
                    unpaired=self._unpaired,
                    num_pairs=len(lengths),
                    num_tokens=int(lengths.sum(dtype=np.int64)),
                    first_token_id=min(self._first_tokens) if len(self._first_tokens) == 1 else None,
                    lengths=summarize_lengths(lengths),
                    file_bytes={kind: self._partial[kind].stat().st_size for kind in manifest.file_kinds},
                    file_digests={kind: digest for kind, digest in digests.items() if digest is not None},
                )
                self._partial["json"].write_text(complete.to_json(), encoding="utf-8", errors="backslashreplace")
                for kind in (*manifest.file_kinds, "json"):
                    _flush_to_disk(self._partial[kind])
                self._paths["json"].unlink(missing_ok=True)  # an interrupted replacement must not pass for the earlier data set
                self._paths["values"].unlink(missing_ok=True)  # the earlier one's, where this one has none
                for kind in manifest.file_kinds:
                    os.replace(self._partial[kind], self._paths[kind])
                if keep_beside is not None:
                    keep_beside()
                os.replace(self._partial["json"], self._paths["json"])
        except DataError:
            self.abandon()
            raise
        self._finished = True
        return complete

    def abandon(self) -> None:
        """Close and remove the partial files."""
        self._finished = True
        with contextlib.suppress(OSError):
            self._builder.data_file.close()
        for path in self._partial.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def check_output_prefix(prefix: str, *, overwrite: bool) -> None:
    """Refuse a prefix that names no file, or at which files stand already, unless they may be replaced.

    What a run that was killed while it renamed its files left there may be: its manifest waits under its temporary name.

    Raises:
        DataError: naming the files found.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        example = os.path.join(prefix, "pairs")
        raise DataError(f"--output-prefix {prefix!r}: a folder, not the beginning of file names. Give one such as {example}.")
    paths = store_paths(prefix)
    found = [path for path in paths.values() if path.exists()]
    was_interrupted = not paths["json"].exists() and store_paths(f"{prefix}.incomplete")["json"].exists()
    if found and not overwrite and not was_interrupted:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{prefix}: {names} already there. Pass --overwrite to replace them, or choose another --output-prefix.")


def _assert_none(wrong: npt.NDArray[np.bool_], lengths: npt.NDArray[Any], problem: str) -> None:
    assert not wrong.any(), f"{problem}: {lengths[wrong.argmax()].tolist()}"


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


class PairStore:
    """A finished data set, memory-mapped.

    Args:
        prefix: path without extension.

    Attributes:
        manifest: what ``PREFIX.json`` says.
        lengths: int32 ``[num_pairs, 3]``, mapped: tokens of prompt, chosen, rejected; 0 for a response that a row does not have.
        longest: most tokens of a prompt with its longer response.
        most_tokens: no row takes more, in whatever layout: each of two responses, or the one that rows have, behind its prompt.
        values: fp32 ``[num_pairs, columns]``: the numbers beside each pair, in the order of the manifest's ``pair_columns``.

    Raises:
        DataError: a file is missing, or does not belong to the others.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._paths = store_paths(self.prefix)
        self.manifest = Manifest.read(self._paths["json"])
        for kind in self.manifest.file_kinds:
            self._check_size(kind)
        index = PairIndex(self._paths["idx"], self.manifest)
        self._data = _indexed_dataset().IndexedDataset(self.prefix)
        self.longest = index.check(self._data.index.dtype_size)
        one_response = self.manifest.unpaired or not self.manifest.has_rejected
        self.most_tokens = self.longest * (1 if one_response else 2)
        self.lengths = index.lengths
        self.values = self._open_values()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)} in {self.prefix}")
        first = (index % len(self)) * SEQUENCES_PER_PAIR
        return TokenizedPair(*(self._data[first + part].astype(np.int64) for part in range(SEQUENCES_PER_PAIR)))

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """int32 ``[rows, 3]``: tokens of prompt, chosen, rejected."""
        return self.lengths[rows]

    def longest_row(self) -> int:
        """The first row of :attr:`longest` tokens."""
        for first, end in row_ranges(len(self)):
            prompt, chosen, rejected = self.lengths[first:end].T
            found = np.flatnonzero(prompt + np.maximum(chosen, rejected) == self.longest)
            if found.size:
                return first + int(found[0])
        raise AssertionError(f"{self.prefix}: no row of {self.longest} tokens")

    def prompt(self, row: int) -> npt.NDArray[np.integer]:
        """The ids of a row's prompt, in the type of the file, mapped."""
        ids: npt.NDArray[np.integer] = self._data[row % len(self) * SEQUENCES_PER_PAIR]
        return ids

    @functools.cached_property
    def lengths_digest(self) -> str:
        """sha256 of all lengths, in hex."""
        return digest_rows(self.lengths)

    @functools.cached_property
    def values_digest(self) -> str:
        """sha256 of all numbers beside the pairs, in hex."""
        return digest_rows(self.values)

    def __reduce__(self) -> tuple[type[PairStore], tuple[str]]:
        return PairStore, (self.prefix,)  # loader workers map the files again instead of receiving copies

    def _check_size(self, kind: str) -> None:
        path, expected = self._paths[kind], self.manifest.file_bytes.get(kind)
        if not path.is_file():
            raise DataError(
                f"{path}: missing, though {self._paths['json'].name} is there. Copy all its files, or preprocess again."
            )
        found = path.stat().st_size
        if found != expected:
            raise DataError(
                f"{path}: {found} bytes, but {self._paths['json'].name} says {expected}: truncated, or from another run. "
                "Copy all files of one run, or preprocess again."
            )

    def _open_values(self) -> npt.NDArray[np.float32]:
        shape = (self.manifest.num_pairs, len(self.manifest.pair_columns))
        if not self.manifest.pair_columns:
            return np.empty(shape, dtype=np.float32)
        path = self._paths["values"]
        try:
            values: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not readable as an array ({error}). Preprocess the data again.") from None
        if values.shape != shape or values.dtype != np.float32:
            raise DataError(
                f"{path}: {values.dtype} {values.shape}, but by {self._paths['json'].name} float32 {shape}: the files are from "
                "different runs. Preprocess again."
            )
        return values
