"""A run in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.trackers.base import Tracker, as_markdown


class TensorBoard(Tracker):
    """Event files. What they hold beyond the step that a run goes on from is left out by TensorBoard.

    Args:
        directory: of the events.
        resumed_step: the step a resumed run has reached, None for a new run.

    Raises:
        ConfigError: the package is missing, or the directory cannot be written.
    """

    def __init__(self, directory: Path, resumed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard-dir {directory}: the package tensorboard is missing. pip install tensorboard"
            ) from error
        try:
            self._writer: Any = SummaryWriter(str(directory), purge_step=None if resumed_step is None else resumed_step + 1)
        except OSError as error:
            raise ConfigError(f"--tensorboard-dir {directory}: cannot be written: {error.strerror}.") from error

    def log_numbers(self, kind: str, record: Mapping[str, float | int]) -> None:
        """Scalars."""
        for name, value in record.items():
            self._writer.add_scalar(f"{kind}/{name}", value, int(record["step"]))
        self._writer.flush()

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """An image."""
        self._writer.add_figure(name, figure, step)
        self._writer.flush()

    def log_table(self, name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
        """A text, in Markdown."""
        self._writer.add_text(name, as_markdown(rows), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
