"""What a run shows: a progress line, metrics.jsonl and what lies beside it, and the trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.reports.progress_line import NO_TEXTS, ProgressLine
from megatron_rmipo.reports.trackers.base import Tracker
from megatron_rmipo.whole_files import replace_file

METRICS_FILE = "metrics.jsonl"
PAIRS_FILE = "held_out_pairs.jsonl"
FIRST_PAIRS_FILE = "held_out_pairs.first.jsonl"
SAMPLES_FILE = "samples.jsonl"
BEST_FILE = "best.json"
FACTS_FILE = "run.json"
# Where evaluations of a run's checkpoints are kept.
EVALUATIONS_FOLDER = "evaluation"
# The kind of an evaluation's records; of a held-out set with a name ``eval/NAME``.
EVALUATION = "eval"
# Held-out pairs that are turned into text together.
_PAIRS_AT_ONCE = 4096


def evaluation_kind(name: str) -> str:
    """Kind of the records of a held-out set: of the main one, whose name is "", ``eval``; else ``eval/NAME``."""
    return f"{EVALUATION}/{name}" if name else EVALUATION


def evaluated_set(record: Mapping[str, Any]) -> str | None:
    """Name of the held-out set that a record of metrics.jsonl is an evaluation of, "" of the main one; None for other records."""
    kind, _, name = str(record.get("kind")).partition("/")
    return name if kind == EVALUATION else None


def evaluations_by_set(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The evaluations among records of metrics.jsonl, in order, by the name of their held-out set."""
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if (name := evaluated_set(record)) is not None:
            sets.setdefault(name, []).append(record)
    return sets


def pairs_file(name: str, *, first: bool = False) -> str:
    """Where the last, or the first, evaluation of a held-out set says something of each pair."""
    main = FIRST_PAIRS_FILE if first else PAIRS_FILE
    return main.replace("held_out_pairs", f"held_out_pairs.{name}") if name else main


class Reporter:
    """Writes records of a run to every place that was asked for. One rank of a run is enabled; on the others nothing happens.

    ``metrics.jsonl`` holds one JSON object per record: ``kind`` (``train``, ``eval`` or ``eval/NAME``), ``time`` (seconds since
    1970), then the record. A number that is not finite is written as null. A resumed run goes on with the file, without the
    records beyond the step it resumes from; a new run puts an existing file aside as ``metrics.1.jsonl`` (or the next free
    number). So it is with ``samples.jsonl``.

    Args:
        log_dir: directory of ``metrics.jsonl``.
        total_steps: steps of the whole run, for the progress line.
        trackers: are told, too, and closed in the end.
        enabled: False on all ranks but one.
        resumed_step: the step a resumed run has reached, None for a new run.
        stream: where the progress line goes; standard output unless given.

    Raises:
        ConfigError: the directory cannot be written.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        total_steps: int,
        trackers: Sequence[Tracker] = (),
        enabled: bool = True,
        resumed_step: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._enabled = enabled
        self._file: TextIO | None = None
        self._trackers = list(trackers)
        self._path = log_dir / METRICS_FILE
        self._can_draw = True
        if not enabled:
            return
        self._progress = ProgressLine(stream or sys.stdout, total_steps)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            _prepare(self._path, resumed_step)
            _prepare(log_dir / SAMPLES_FILE, resumed_step)
            self._evaluated = {record["kind"] for record in self.evaluations()}
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
        for tracker in self._trackers:
            tracker.log_numbers(kind, record)

    def log_figure(self, name: str, draw: Callable[[], Any], step: int) -> None:
        """Show a picture in every tracker; without matplotlib, which is said once, or without trackers, nothing is drawn.

        Args:
            name: of the picture.
            draw: gives matplotlib's ``Figure``, or None for nothing to draw; raises ConfigError where matplotlib is missing.
            step: that it belongs to.
        """
        if not (self._enabled and self._trackers and self._can_draw):
            return
        try:
            figure = draw()
        except ConfigError as error:
            self._can_draw = False
            self.say(f"note: trackers get no pictures: {error}")
            return
        if figure is not None:
            for tracker in self._trackers:
                tracker.log_figure(name, figure, step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add answers of the policy to ``samples.jsonl``, with their step, and show them in the trackers.

        Raises:
            RmipoError: the file cannot be written.
        """
        if not self._enabled:
            return
        path = self._path.with_name(SAMPLES_FILE)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
        except OSError as error:
            raise RmipoError(f"{path}: cannot be written: {error.strerror}.") from error
        for tracker in self._trackers:
            tracker.log_table("samples", [{name: str(value) for name, value in sample.items()} for sample in samples], step)

    def has_samples(self, step: int) -> bool:
        """Whether the file holds answers of this step; False where nothing is reported."""
        path = self._path.with_name(SAMPLES_FILE)
        return self._enabled and path.exists() and any(record["step"] == step for record in _records(path))

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of all evaluations that the file holds, in order, of every held-out set; none where nothing is reported."""
        if not (self._enabled and self._path.exists()):
            return []
        return [record for record in _records(self._path) if evaluated_set(record) is not None]

    def has_record(self, kind: str, step: int) -> bool:
        """Whether the file holds a record of this kind and step; False where nothing is reported."""
        if not self._enabled:
            return False
        return any((record["kind"], record["step"]) == (kind, step) for record in _records(self._path))

    def log_pairs(self, step: int, values: Mapping[str, np.ndarray], name: str = "") -> None:
        """Write what an evaluation said of each held-out pair to ``held_out_pairs.jsonl``, in place of the one before.

        The first evaluation in metrics.jsonl is kept in ``held_out_pairs.first.jsonl`` as well: only pair by pair is it known how
        far a change is beyond chance. Of a set with a name they are ``held_out_pairs.NAME.jsonl`` and
        ``held_out_pairs.NAME.first.jsonl``.

        Args:
            step: of the evaluation; in each line, which tells the pairs of two evaluations apart.
            values: name -> ``[P]``, a number per pair, in stored order.
            name: of the held-out set, "" for the main one.

        Raises:
            RmipoError: the file cannot be written.
        """
        if not self._enabled:
            return
        kind = evaluation_kind(name)
        for first in (False,) if kind in self._evaluated else (True, False):
            path = self._path.with_name(pairs_file(name, first=first))
            try:
                replace_file(path, _lines_of_pairs(step, values))
            except OSError as error:
                raise RmipoError(f"{path}: cannot be written: {error.strerror}.") from error
        self._evaluated.add(kind)

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
        for tracker in self._trackers:
            tracker.close()

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
        replace_file(path, (line.rstrip("\n") + "\n" for line in lines if _is_before(line, resumed_step)))


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
