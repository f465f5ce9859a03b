"""What a run shows: a progress line, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.reports.progress_line import NO_TEXTS, ProgressLine

METRICS_FILE = "metrics.jsonl"
PAIRS_FILE = "held_out_pairs.jsonl"
FIRST_PAIRS_FILE = "held_out_pairs.first.jsonl"
WANDB_RUN_FILE = "wandb_run_id"
# Held-out pairs that are turned into text together.
_PAIRS_AT_ONCE = 4096


class Reporter:
    """Writes records of a run to every place that was asked for. One rank of a run is enabled; on the others nothing happens.

    ``metrics.jsonl`` holds one JSON object per record: ``kind`` (``train`` or ``eval``), ``time`` (seconds since 1970), then the
    record. A number that is not finite is written as null. A resumed run goes on with the file, without the records beyond the
    step it resumes from; a new run puts an existing file aside as ``metrics.1.jsonl`` (or the next free number).

    Args:
        log_dir: directory of ``metrics.jsonl``.
        tensorboard_dir: also write TensorBoard events here.
        wandb_project: also log to this Weights & Biases project.
        wandb_exp_name: name of the Weights & Biases run.
        total_steps: steps of the whole run, for the progress line.
        config: the run's configuration, flat, of plain types; sent to Weights & Biases.
        enabled: False on all ranks but one.
        resumed_step: the step a resumed run has reached, None for a new run.
        stream: where the progress line goes; standard output unless given.

    Raises:
        ConfigError: a directory cannot be written, or a package that was asked for is missing.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        tensorboard_dir: Path | None = None,
        wandb_project: str | None = None,
        wandb_exp_name: str | None = None,
        total_steps: int,
        config: Mapping[str, Any],
        enabled: bool = True,
        resumed_step: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._enabled = enabled
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._path = log_dir / METRICS_FILE
        if not enabled:
            return
        self._progress = ProgressLine(stream or sys.stdout, total_steps)
        if tensorboard_dir is not None:
            self._tensorboard = _open_tensorboard(tensorboard_dir, resumed_step)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            if wandb_project is not None:
                self._wandb = _open_wandb(log_dir, wandb_project, wandb_exp_name, config)
            # Last, so that a run that cannot start leaves an earlier one's file alone.
            _prepare(self._path, resumed_step)
            self._is_first_evaluation = not _has_evaluation(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-dir {log_dir}: cannot be written: {error.strerror}. Name another directory.") from error

    def log(self, kind: str, record: Mapping[str, float | int], texts: Mapping[str, str] = NO_TEXTS) -> None:
        """Write one record everywhere.

        Args:
            kind: ``train`` or ``eval``.
            record: name -> number; ``step`` among them.
            texts: name -> text, for metrics.jsonl and the progress line: TensorBoard draws numbers.

        Raises:
            RmipoError: metrics.jsonl cannot be written.
        """
        if not self._enabled:
            return
        assert self._file is not None, "logged to a closed reporter"
        line = {
            "kind": kind,
            "time": round(time.time(), 3),
            **{name: _json_number(value) for name, value in record.items()},
            **texts,
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise RmipoError(f"{self._path}: cannot be written: {error.strerror}.") from error
        self._progress.show(kind, record, texts)
        if self._tensorboard is not None:
            for name, value in record.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, int(record["step"]))
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(
                {"step": record["step"], **{f"{kind}/{name}": value for name, value in record.items() if name != "step"}}
            )

    def has_record(self, kind: str, step: int) -> bool:
        """Whether the file holds a record of this kind and step; False where nothing is reported."""
        if not self._enabled:
            return False
        return any((record["kind"], record["step"]) == (kind, step) for record in _records(self._path))

    def log_pairs(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Write what an evaluation said of each held-out pair to ``held_out_pairs.jsonl``, in place of the one before.

        The first evaluation in metrics.jsonl is kept in ``held_out_pairs.first.jsonl`` as well: only pair by pair is it known how
        far a change is beyond chance.

        Args:
            step: of the evaluation; in each line, which tells the pairs of two evaluations apart.
            values: name -> ``[P]``, a number per pair, in stored order.

        Raises:
            RmipoError: the file cannot be written.
        """
        if not self._enabled:
            return
        names = (FIRST_PAIRS_FILE, PAIRS_FILE) if self._is_first_evaluation else (PAIRS_FILE,)
        for name in names:
            path = self._path.with_name(name)
            try:
                _replace(path, _lines_of_pairs(step, values))
            except OSError as error:
                raise RmipoError(f"{path}: cannot be written: {error.strerror}.") from error
        self._is_first_evaluation = False

    def warn(self, text: str) -> None:
        """Show a line above the progress line."""
        if self._enabled:
            self._progress.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Show a line above the progress line, without the word warning."""
        if self._enabled:
            self._progress.say(text)

    def close(self) -> None:
        """Finish every place; closing twice does nothing."""
        if self._file is None:
            return
        self._progress.close()
        self._file.close()
        self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _prepare(path: Path, resumed_step: int | None) -> None:
    """Put an earlier run's file aside, or keep of this run's file what lies before the step it resumes from."""
    if not path.exists():
        return
    if resumed_step is None:
        number = 1
        while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
        return
    with path.open(encoding="utf-8") as lines:
        # The last one may lack its end.
        _replace(path, (line.rstrip("\n") + "\n" for line in lines if _is_before(line, resumed_step)))


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file in place of the one before, in one step, a line at a time: it may be as large as the data."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(temporary, path)


def _lines_of_pairs(step: int, values: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line for each held-out pair."""
    num_pairs = len(next(iter(values.values())))
    for first in range(0, num_pairs, _PAIRS_AT_ONCE):
        columns = [map(_json_number, column[first : first + _PAIRS_AT_ONCE].tolist()) for column in values.values()]
        for row in zip(*columns, strict=True):
            yield json.dumps({"step": step, **dict(zip(values, row, strict=True))}) + "\n"


def _is_before(line: str, resumed_step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= resumed_step)
    except (ValueError, KeyError, TypeError):
        # The last line of a run that was killed while writing it.
        return False


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one after the other: a long run's hold many."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _has_evaluation(path: Path) -> bool:
    return path.exists() and any(record.get("kind") == "eval" for record in _records(path))


def _open_tensorboard(directory: Path, resumed_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"--tensorboard-dir {directory}: the package tensorboard is missing. pip install tensorboard"
        ) from error
    try:
        return SummaryWriter(str(directory), purge_step=None if resumed_step is None else resumed_step + 1)
    except OSError as error:
        raise ConfigError(f"--tensorboard-dir {directory}: cannot be written: {error.strerror}.") from error


def _open_wandb(log_dir: Path, project: str, name: str | None, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"--wandb-project {project}: the package wandb is missing. "
            "Install it with pip install 'megatron-rmipo[wandb]', or leave the flag out."
        ) from error
    remembered = log_dir / WANDB_RUN_FILE
    run_id = remembered.read_text(encoding="utf-8").strip() if remembered.exists() else None
    run = wandb.init(project=project, name=name, config=dict(config), dir=str(log_dir), id=run_id, resume="allow")
    remembered.write_text(run.id, encoding="utf-8")
    # A resumed run may log a step again; with a step of our own none is refused.
    run.define_metric("*", step_metric="step")
    return run
