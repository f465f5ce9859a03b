"""What a run has left in its log directory, read for its report: also of a run that still goes on, or has stopped early."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.page.run_facts import read_facts
from megatron_rmipo.reports.page.token_record import TOKENS_FILE
from megatron_rmipo.reports.reporter import BEST_FILE, METRICS_FILE, SAMPLES_FILE, evaluated_set, pairs_file
from megatron_rmipo.reports.summary import read_configuration

EVALUATIONS_FOLDER = "evaluation"


@dataclasses.dataclass
class Column:
    """A number over the steps of a run."""

    steps: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    values: array[float] = dataclasses.field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """Append the value at a step."""
        self.steps.append(step)
        self.values.append(value)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What the evaluations of one set of held-out pairs said.

    Attributes:
        records: the evaluations, in order.
        first, last: of each pair, at the first evaluation and at the last; empty where they are not of these evaluations.
    """

    records: Sequence[Record]
    first: Sequence[Record]
    last: Sequence[Record]


@dataclasses.dataclass(frozen=True)
class PageRun:
    """A run, as its files tell it.

    Attributes:
        name: what it is called.
        log_dir: where the files are.
        config: its flags, flat.
        facts: of ``run.json``, empty where there is none.
        columns: of its training steps, by name.
        last_step: the record of the last one, empty where there is none.
        held_out: by name of the set, "" for the run's own.
        tokens, samples: records of ``token_logps.jsonl`` and ``samples.jsonl``.
        best: of ``best.json``, empty where there is none.
    """

    name: str
    log_dir: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    columns: Mapping[str, Column]
    last_step: Record
    held_out: Mapping[str, HeldOut]
    tokens: Sequence[Record]
    samples: Sequence[Record]
    best: Mapping[str, Any]

    @property
    def step(self) -> int:
        """How far it has come."""
        ends = [self.last_step, *(one.records[-1] for one in self.held_out.values() if one.records)]
        return max((int(end.get("step", 0)) for end in ends), default=0)

    @property
    def train_iters(self) -> int | None:
        """Steps of the whole run, where they are known."""
        return self.facts.get("train_iters") or self.config.get("train_iters")

    @property
    def is_complete(self) -> bool:
        """Whether it has taken its last step, or stopped early; so is taken what does not say how many steps there are."""
        return self.train_iters is None or self.step >= self.train_iters or bool(self.early_stop)

    @property
    def early_stop(self) -> str:
        """Why it stopped early, in words; empty where it did not."""
        return str(self.facts.get("early_stop") or "")

    @property
    def main_held_out(self) -> HeldOut | None:
        """The held-out pairs that it is judged by at first sight: its own, without those the first further set."""
        return self.held_out.get("") or next(iter(self.held_out.values()), None)


def find_log_dir(run: Path) -> Path:
    """The log directory of a run: the one that was named, or ``logs`` in it.

    Raises:
        ConfigError: neither has a metrics.jsonl.
    """
    for directory in (run, run / "logs"):
        if (directory / METRICS_FILE).is_file():
            return directory
    raise ConfigError(f"{run}: no {METRICS_FILE} there or in its logs/. Name the directory of a run (SAVE), or its --log-dir.")


def read_page_run(run: Path) -> PageRun:
    """Read a run.

    Args:
        run: its directory, or its log directory.

    Raises:
        ConfigError: it has no records or no configuration, or they are damaged before their end.
    """
    log_dir = find_log_dir(run)
    columns: dict[str, Column] = {}
    evaluations: dict[str, list[Record]] = {}
    last_step: Record = {}
    for record in records_so_far(log_dir / METRICS_FILE):
        kind, step = record.get("kind"), record.get("step")
        if kind == "train" and step is not None:
            last_step = record
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    columns.setdefault(name, Column()).add(step, value)
        elif (held_out := evaluated_set(record)) is not None:
            evaluations.setdefault(held_out, []).append(record)
    return PageRun(
        name=_name(log_dir),
        log_dir=log_dir,
        config=read_configuration(log_dir),
        facts=read_facts(log_dir),
        columns=columns,
        last_step=last_step,
        held_out={name: _held_out(log_dir, name, records) for name, records in evaluations.items()},
        tokens=_records_of(log_dir / TOKENS_FILE),
        samples=_records_of(log_dir / SAMPLES_FILE),
        best=_object_of(log_dir / BEST_FILE),
    )


def records_so_far(path: Path) -> Iterator[Record]:
    """The JSON objects of a file, one a line; a last line that is being written yet, or was when its run was killed, is left out.

    Raises:
        ConfigError: the file cannot be read, or another line of it is damaged.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    if not line.endswith("\n"):
                        return
                    raise ConfigError(f"{path}:{number}: not a JSON record: {line.rstrip()[:60]!r}.") from error
                if isinstance(record, dict):
                    yield record
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error


def _records_of(path: Path) -> list[Record]:
    return list(records_so_far(path)) if path.is_file() else []


def _object_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _held_out(log_dir: Path, name: str, records: Sequence[Record]) -> HeldOut:
    """Pairs of a set are taken where they are those of its first and its last evaluation."""
    found = []
    for is_first, evaluation in ((True, records[0]), (False, records[-1])):
        pairs = _records_of(log_dir / pairs_file(name, first=is_first))
        found.append(pairs if pairs and pairs[0].get("step", evaluation["step"]) == evaluation["step"] else [])
    return HeldOut(records, *found)


def _name(log_dir: Path) -> str:
    """The last two folders: runs of the example scripts have one name in different ones."""
    run = log_dir.resolve()
    run = run.parent if run.name == "logs" else run
    return "/".join(run.parts[-2:])
