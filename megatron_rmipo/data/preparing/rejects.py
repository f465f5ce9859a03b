"""``PREFIX.rejects.jsonl``: the rows that were left out, and why."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from pathlib import Path

from megatron_rmipo.data.store.disk import write_errors_named


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row left out: where it stands, and why.

    Attributes:
        source: file or data set name.
        unit: what ``number`` counts: ``line`` of a file or ``row`` of a data set, from 1.
        number: its place.
        reason: a key of :data:`megatron_rmipo.data.reading.rows.REASONS`.
        field: the column at fault, empty where none is.
        message: what is wrong.
        excerpt: the beginning of the row.
    """

    source: str
    unit: str
    number: int
    reason: str
    field: str
    message: str
    excerpt: str

    def __str__(self) -> str:
        where = f"{self.source}: {self.unit} {self.number}" + (f", {self.field}" if self.field else "")
        return f"{where}: {self.message} [{self.reason}]"


class RejectsFile:
    """``PREFIX.rejects.jsonl``: every row left out.

    A context manager: what was written is removed unless :meth:`keep` or :meth:`keep_failed` is called.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.rejects.jsonl")
        self.failed_path = Path(f"{prefix}.failed.rejects.jsonl")
        self._partial = Path(f"{prefix}.incomplete.rejects.jsonl")
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, Reject] = {}

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return self.counts.total()

    def __enter__(self) -> RejectsFile:
        with write_errors_named(self._partial):
            # half a surrogate pair, which JSON can write and UTF-8 cannot, stays readable as its escape
            self._stream = open(self._partial, "w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        """List one row."""
        self.counts[reject.reason] += 1
        self.examples.setdefault(reject.reason, reject)
        with write_errors_named(self._partial):
            self._stream.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")

    def complete(self) -> None:
        """Write out the whole list, under its temporary name, so that :meth:`keep` needs no more space.

        Raises:
            DataError: the disk failed.
        """
        with write_errors_named(self._partial):
            self._stream.close()

    def keep(self) -> None:
        """Put the list beside its finished data set; those left by earlier runs go."""
        self.complete()
        with write_errors_named(self.path):
            self.failed_path.unlink(missing_ok=True)
            if self.total:
                os.replace(self._partial, self.path)
            else:
                self.path.unlink(missing_ok=True)

    def keep_failed(self) -> None:
        """Put the list of a run that writes no data set beside that of an earlier data set, which stays."""
        self.complete()
        with write_errors_named(self.failed_path):
            os.replace(self._partial, self.failed_path)
