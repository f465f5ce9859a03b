"""Log-probs of a data set's responses under a frozen reference, kept beside the data: computed once, then memory-mapped.

``PREFIX.reference/matched-KEY/``, or the same in a directory of the user's choice, holds ``scores.npy`` (fp32 ``[P, 2]``, sums
over the chosen and the rejected response of each row; 0 where a row has no such response) and ``progress.json``, which says what
they depend on. KEY is a hash of that, so what was computed for other data, another tokenizer or another reference is never taken
for it. ``mismatched-KEY`` holds the same for the pairs of :mod:`megatron_rmipo.data.store.mismatch`, ``alone-KEY`` and
``alone-after-ID-KEY`` for responses without their prompts.

Which rows are scored, ``scores.npy`` says itself. It begins as one hole, which costs no space and reads as zeros: a row whose
eight bytes are zero is not scored, and a 0 that is a score is written as -0.0. Nor is a row scored that holds a number that is
not finite: older versions began with NaN in every row, and counted in ``progress.json`` how many were done from the first on.
So a row and the record of it cannot differ, and nobody rewrites what others write, too:

- Runs at once on the same data compute the same rows, each for itself, and write the same numbers, up to rounding.
- A row is written by one call of the system and crosses no page: a process that is killed leaves it whole or not there. What was
  written before stays. A machine that fails loses what was written since the last flush, row by row, not the rest.

Shape letters: P rows, n some of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.disk import write_errors_named
from megatron_rmipo.data.store.file_digests import sha256_of
from megatron_rmipo.data.store.manifest import Manifest, store_paths
from megatron_rmipo.data.store.row_set import RowSet
from megatron_rmipo.errors import DataError

SCORES_FILE, PROGRESS_FILE = "scores.npy", "progress.json"
_ELSEWHERE = "name another directory with --reference-cache"
Scores = npt.NDArray[np.float32]
# ``matched``, ``mismatched``, or that of responses alone.
Kind = str
_ROW_BYTES = 8
_ROWS_READ = 1 << 18  # together: 2 MB; a multiple of 8
# Counted up when the rule of what is scored changes (which rows are matched, how long they may be).
_RULE = 1


class ScoreTable(Protocol):
    """Scores of a data set's rows, on disk (:class:`KeptScores`) or in memory (an array, fp32 ``[P, 2]``)."""

    def __getitem__(self, rows: npt.NDArray[np.int64], /) -> Scores:
        """Those of ``rows``, fp32 ``[n, 2]``; NaN where there are none."""


@dataclasses.dataclass(frozen=True)
class ScoreKey:
    """What the scores of a data set depend on.

    Attributes:
        data: see :func:`data_fingerprint`.
        tokenizer: fingerprint of the tokenizer that made the data.
        reference: fingerprint of the reference's weights and architecture.
        dtype: what they were computed in: ``float32`` or ``bfloat16``.
        kind: ``matched`` (each prompt with its own responses), ``mismatched``, or that of
            :class:`megatron_rmipo.data.store.alone.ResponsesAlone`.
    """

    data: str
    tokenizer: str
    reference: str
    dtype: str
    kind: Kind

    @property
    def digest(self) -> str:
        """Hex digest over all fields, and over the rule by which rows are scored."""
        content = {**dataclasses.asdict(self), "rule": _RULE}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_fingerprint(prefix: str, cache: str | None = None) -> str:
    """sha256 of a data set's tokens and index. Those of large data are read once at most, see :func:`sha256_of`.

    Args:
        prefix: of the data set.
        cache: as of :func:`score_directory`: where what had to be computed is kept.

    Raises:
        DataError: there is no manifest.
    """
    paths = store_paths(prefix)
    written = Manifest.read(paths["json"]).file_digests
    digest = hashlib.sha256()
    for kind in ("bin", "idx"):
        found = sha256_of(paths[kind], paths["json"], written.get(kind), _score_root(prefix, cache))
        digest.update(bytes.fromhex(found))
    return digest.hexdigest()


def score_directory(prefix: str, cache: str | None, key: ScoreKey) -> Path:
    """Where the scores for a key lie, or would: beside the data, or in the directory ``cache``."""
    return _score_root(prefix, cache) / f"{key.kind}-{key.digest[:16]}"


def _score_root(prefix: str, cache: str | None) -> Path:
    return Path(f"{prefix}.reference") if cache is None else Path(cache)


class KeptScores:
    """Scores of a data set on disk, memory-mapped: those rows that are scored so far.

    Args:
        directory: from :func:`score_directory`.
        num_rows: P.

    Attributes:
        directory: as given.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, directory: Path, num_rows: int) -> None:
        self.directory, self._num_rows = directory, num_rows
        self._array = _open_array(directory, num_rows)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Scores:
        """Scores of ``rows``, fp32 ``[n, 2]``; NaN where there are none."""
        found = np.array(self._array[rows])
        found[~_are_scored(found)] = np.nan
        return found

    def unscored(self) -> RowSet:
        """The rows that are not scored yet. Reads the whole file once, a piece at a time."""
        parts = (self._array[first : first + _ROWS_READ] for first in range(0, self._num_rows, _ROWS_READ))
        return RowSet(self._num_rows, np.concatenate([np.packbits(~_are_scored(part), bitorder="little") for part in parts]))

    def __reduce__(self) -> tuple[type[KeptScores], tuple[Path, int]]:
        return KeptScores, (self.directory, self._num_rows)  # loader workers map the file again instead of receiving a copy


def _are_scored(scores: Scores) -> npt.NDArray[np.bool_]:
    """Of each row of fp32 ``[n, 2]``, as it stands in the file, whether it holds scores."""
    finite = np.isfinite(scores)
    scored: npt.NDArray[np.bool_] = finite[:, 0] & finite[:, 1] & (scores.view(np.uint64)[:, 0] != 0)
    return scored


def open_scores(directory: Path, key: ScoreKey, num_rows: int) -> KeptScores | None:
    """The scores of a data set, as far as there are any; None where none were ever kept.

    Raises:
        DataError: the files are damaged, or of something else.
    """
    with write_errors_named(directory, _ELSEWHERE):
        exists = directory.exists()
    if not exists:
        return None
    _check_key(directory, key)
    return KeptScores(directory, num_rows)


class ScoreWriter:
    """Writes scores of a data set, in any order. A context manager, used by one rank.

    Args:
        directory: from :func:`score_directory`. Made if missing.
        key: what the scores depend on.
        num_rows: P.

    Raises:
        DataError: it cannot be written, or what is there is damaged.
    """

    def __init__(self, directory: Path, key: ScoreKey, num_rows: int) -> None:
        self.directory, self._num_rows = directory, num_rows
        with write_errors_named(directory, _ELSEWHERE):
            if not directory.exists():
                self._create(key)
            _check_key(directory, key)
            self._start = _open_array(directory, num_rows).offset
            self._descriptor = os.open(directory / SCORES_FILE, os.O_WRONLY)

    def _create(self, key: ScoreKey) -> None:
        # Appears whole: another run may start on the same data at the same moment.
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=self.directory.parent) as folder:
            partial = Path(folder) / "scores"
            partial.mkdir()
            np.lib.format.open_memmap(partial / SCORES_FILE, mode="w+", dtype=np.float32, shape=(self._num_rows, 2))
            text = json.dumps({"key": dataclasses.asdict(key)}, indent=2) + "\n"
            (partial / PROGRESS_FILE).write_text(text, encoding="utf-8")
            try:
                os.rename(partial, self.directory)
            except OSError:
                if not self.directory.exists():
                    raise

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._descriptor)

    def write(self, rows: npt.NDArray[np.int64], scores: Scores) -> None:
        """Write scores, where every process sees them and none that is killed takes them away.

        Args:
            rows: int64 ``[n]``, ascending.
            scores: of these rows, fp32 ``[n, 2]``, finite, see :func:`refuse_not_finite`.

        Raises:
            DataError: the disk failed.
        """
        assert np.isfinite(scores).all()
        written = np.where(scores == 0, np.float32(-0.0), scores)
        with write_errors_named(self.directory, _ELSEWHERE):
            for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                self._put(int(rows[run[0]]), written[run].tobytes())

    def _put(self, row: int, content: bytes) -> None:
        # Not through a memory map: there a full disk kills the process, and a kill may leave half a row.
        place = self._start + row * _ROW_BYTES
        while content:
            num_written = os.pwrite(self._descriptor, content, place)
            content, place = content[num_written:], place + num_written

    def flush(self) -> None:
        """Return when what was written outlasts a failure of the machine.

        Raises:
            DataError: the disk failed.
        """
        with write_errors_named(self.directory, _ELSEWHERE):
            os.fsync(self._descriptor)


def refuse_not_finite(directory: Path, rows: npt.NDArray[np.int64], scores: Scores) -> None:
    """Refuse scores, fp32 ``[n, 2]``, of ``rows`` that cannot be kept in ``directory``.

    Raises:
        DataError: one is not finite (naming its row).
    """
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if broken.size:
        raise DataError(
            f"{directory}: the log-prob of pair {rows[broken[0]]} of the data set under the reference is not finite. "
            "Look at it with tools/inspect_pairs.py, and check the reference with tools/verify_conversion.py."
        )


def _open_array(directory: Path, num_rows: int) -> np.memmap[Any, np.dtype[np.float32]]:
    path = directory / SCORES_FILE
    try:
        array: np.memmap[Any, np.dtype[np.float32]] = np.load(path, mmap_mode="r")
    except PermissionError:
        raise DataError(f"{path}: not readable for this user. Change its permissions.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not readable as an array ({error}). Remove {directory}; it is computed again.") from None
    if array.shape != (num_rows, 2) or array.dtype != np.float32:
        raise DataError(
            f"{path}: {array.dtype} {array.shape}, expected float32 ({num_rows}, 2). Remove {directory}; it is computed again."
        )
    return array


def _check_key(directory: Path, key: ScoreKey) -> None:
    path = directory / PROGRESS_FILE
    try:
        found = ScoreKey(**json.loads(path.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error!r}). Remove {directory}; it is computed again.") from None
    if found != key:
        raise DataError(f"{path}: holds scores for {found}, not for {key}. Remove {directory}; it is computed again.")
