"""Log-probs of a data set's responses under a frozen reference, kept beside the data: computed once, then memory-mapped.

``PREFIX.reference/matched-KEY/``, or the same in a directory of the user's choice, holds ``scores.npy`` (fp32 ``[P, 2]``, sums
over the chosen and the rejected response of each row; 0 where a row has no such response) and ``progress.json``. KEY is a hash of
everything the numbers depend on, so what was computed for other data, another tokenizer or another reference is never taken for
it. ``mismatched-KEY`` holds the same for the pairs of :mod:`megatron_rmipo.data.store.mismatch`.

Shape letter: P rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.store.disk import write_errors_named
from megatron_rmipo.data.store.file_digests import sha256_of
from megatron_rmipo.data.store.manifest import Manifest, store_paths
from megatron_rmipo.errors import DataError

SCORES_FILE, PROGRESS_FILE = "scores.npy", "progress.json"
_ELSEWHERE = "name another directory with --reference-cache"
Scores = npt.NDArray[np.float32]
Kind = Literal["matched", "mismatched"]
# Counted up when the rule of what is scored changes (which rows are matched, how long they may be).
_RULE = 1


@dataclasses.dataclass(frozen=True)
class ScoreKey:
    """What the scores of a data set depend on.

    Attributes:
        data: see :func:`data_fingerprint`.
        tokenizer: fingerprint of the tokenizer that made the data.
        reference: fingerprint of the reference's weights and architecture.
        dtype: what they were computed in: ``float32`` or ``bfloat16``.
        kind: ``matched`` (each prompt with its own responses) or ``mismatched``.
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


def open_scores(directory: Path, key: ScoreKey, num_rows: int) -> Scores | None:
    """The finished scores of a data set, memory-mapped, fp32 ``[P, 2]``; None where there are none, or not all yet.

    Raises:
        DataError: the files are damaged.
    """
    with write_errors_named(directory, _ELSEWHERE):
        exists = directory.exists()
    if not exists or _read_progress(directory, key) < num_rows:
        return None
    scores = _open_array(directory, num_rows, "r")
    if not np.isfinite(scores).all():
        raise DataError(
            f"{directory / SCORES_FILE}: holds numbers that are not finite. Remove {directory}; it is computed again."
        )
    return scores


class ScoreWriter:
    """Writes the scores of a data set in stored order, going on where an earlier one was stopped. Used by one rank.

    Args:
        directory: from :func:`score_directory`.
        key: what the scores depend on.
        num_rows: P.

    Attributes:
        num_done: rows whose scores are on the disk.

    Raises:
        DataError: it cannot be written, or what is there is damaged.
    """

    def __init__(self, directory: Path, key: ScoreKey, num_rows: int) -> None:
        self.directory, self._key = directory, key
        with write_errors_named(directory, _ELSEWHERE):
            if not self.directory.exists():
                self._create(num_rows)
            self.num_done = _read_progress(self.directory, key)
            self._array = _open_array(self.directory, num_rows, "r+")

    def _create(self, num_rows: int) -> None:
        # Appears whole: another run may start on the same data at the same moment.
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=self.directory.parent) as folder:
            partial = Path(folder) / "scores"
            partial.mkdir()
            np.save(partial / SCORES_FILE, np.full((num_rows, 2), np.nan, dtype=np.float32))
            _write_progress(partial, self._key, 0)
            try:
                os.rename(partial, self.directory)
            except OSError:
                if not self.directory.exists():
                    raise

    def write(self, scores: Scores) -> None:
        """Write the next rows' scores, fp32 ``[rows, 2]``; they are on the disk when this returns.

        Raises:
            DataError: a score is not finite (naming its row), or the disk failed.
        """
        if not np.isfinite(scores).all():
            row = self.num_done + int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise DataError(
                f"{self.directory}: the log-prob of pair {row} of the data set under the reference is not finite. "
                "Look at it with tools/inspect_pairs.py, and check the reference with tools/verify_conversion.py."
            )
        with write_errors_named(self.directory, _ELSEWHERE):
            self._array[self.num_done : self.num_done + len(scores)] = scores
            self._array.flush()
            self.num_done += len(scores)
            # A run beside this one may be further.
            _write_progress(self.directory, self._key, max(self.num_done, _read_progress(self.directory, self._key)))


def _open_array(directory: Path, num_rows: int, mode: Literal["r", "r+"]) -> np.memmap[Any, np.dtype[np.float32]]:
    path = directory / SCORES_FILE
    try:
        array: np.memmap[Any, np.dtype[np.float32]] = np.load(path, mmap_mode=mode)
    except PermissionError:
        if mode == "r":
            raise DataError(f"{path}: not readable for this user. Change its permissions.") from None
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not readable as an array ({error}). Remove {directory}; it is computed again.") from None
    if array.shape != (num_rows, 2) or array.dtype != np.float32:
        raise DataError(
            f"{path}: {array.dtype} {array.shape}, expected float32 ({num_rows}, 2). Remove {directory}; it is computed again."
        )
    return array


def _read_progress(directory: Path, key: ScoreKey) -> int:
    path = directory / PROGRESS_FILE
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        found, num_done = ScoreKey(**progress["key"]), int(progress["num_done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error!r}). Remove {directory}; it is computed again.") from None
    if found != key:
        raise DataError(f"{path}: holds scores for {found}, not for {key}. Remove {directory}; it is computed again.")
    return num_done


def _write_progress(directory: Path, key: ScoreKey, num_done: int) -> None:
    text = json.dumps({"key": dataclasses.asdict(key), "num_done": num_done}, indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=directory)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / PROGRESS_FILE)
    except OSError:
        os.unlink(temporary)
        raise
