"""What a tracker is given of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Tracker(ABC):
    """A place where another program shows a run, beside metrics.jsonl. One rank of a run has them.

    A run that goes on repeats no step that a tracker was told of before its checkpoint; those after it are told again.
    """

    @abstractmethod
    def log_numbers(self, kind: str, record: Mapping[str, float | int]) -> None:
        """A record of metrics.jsonl: ``step``, and other numbers by name, which are shown as ``kind/name``."""

    @abstractmethod
    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """A picture, as matplotlib's ``Figure``."""

    @abstractmethod
    def log_table(self, name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
        """Texts by column, the same columns in every row; at least one row."""

    @abstractmethod
    def close(self) -> None:
        """Finish. Nothing is told afterwards."""


class RememberedRun:
    """The id by which a service knows a run, in a file of its log directory: a run that goes on is the same one there.

    Args:
        path: the file.
        resumes: whether the run goes on; a new one in the same directory gets an id of its own.
    """

    def __init__(self, path: Path, *, resumes: bool) -> None:
        self._path = path
        self.id = path.read_text(encoding="utf-8").strip() or None if resumes and path.exists() else None

    def remember(self, run_id: str) -> None:
        """Write down the id that the service gave."""
        self._path.write_text(run_id, encoding="utf-8")


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of texts, as they are, in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
