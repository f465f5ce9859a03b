"""The runs that a picture is drawn of: where their logs lie, what they are called, and what is read of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.pictures.densities import Column
from megatron_rmipo.reports.pictures.style import short_label
from megatron_rmipo.reports.reporter import EVALUATIONS_FOLDER, FIRST_PAIRS_FILE, METRICS_FILE, PAIRS_FILE
from megatron_rmipo.reports.summary import read_configuration, read_pairs, read_records


@dataclasses.dataclass(frozen=True)
class Run:
    """A run and its logs, each file read when it is first asked for.

    Attributes:
        label: what the run is called in a picture.
        log_dir: where its metrics.jsonl lies.
    """

    label: str
    log_dir: Path

    @functools.cached_property
    def records(self) -> list[Record]:
        """What metrics.jsonl holds."""
        return list(read_records(self.log_dir / METRICS_FILE))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration, flat."""
        return read_configuration(self.log_dir)

    @property
    def steps(self) -> list[Record]:
        """The records of its training."""
        return [record for record in self.records if record.get("kind") == "train"]

    @property
    def evaluations(self) -> list[Record]:
        """The records of its evaluations."""
        return [record for record in self.records if record.get("kind") == "eval"]

    @functools.cached_property
    def first_pairs(self) -> list[Record]:
        """What the first evaluation said of each held-out pair; empty where that is not there, or is the last one's, too."""
        evaluations = self.evaluations
        return read_pairs(self.log_dir, evaluations[0], FIRST_PAIRS_FILE) if len(evaluations) > 1 else []

    @functools.cached_property
    def last_pairs(self) -> list[Record]:
        """What the last evaluation said of each held-out pair.

        Raises:
            ConfigError: there was none, or that is not there.
        """
        evaluations = self.evaluations
        pairs = read_pairs(self.log_dir, evaluations[-1]) if evaluations else []
        if not pairs:
            raise ConfigError(
                f"{self.log_dir / PAIRS_FILE} is missing, or of another evaluation than the last. Train with --valid-data-path "
                "or --split."
            )
        return pairs

    @property
    def evaluation_files(self) -> list[Path]:
        """Files of evaluations that lie with the run, by name."""
        places = [self.log_dir, *([self.log_dir.parent] if self.log_dir.name == "logs" else [])]
        return sorted(path for place in places for path in (place / EVALUATIONS_FOLDER).glob("*.json"))


def gaps_of(pairs: Sequence[Record]) -> Column:
    """``[P]``: log p(y|x) per token, chosen less rejected; NaN of a pair that lacks one."""
    return values_of(pairs, "logps/chosen") - values_of(pairs, "logps/rejected")


def values_of(pairs: Sequence[Record], name: str) -> Column:
    """``[P]``: a metric of each pair; NaN of one that lacks it."""
    return np.array([np.nan if pair.get(name) is None else pair[name] for pair in pairs], dtype=np.float64)


def find_runs(words: Sequence[str]) -> list[Run]:
    """The runs that a command line names.

    Args:
        words: each ``DIR`` or ``LABEL=DIR``: what a run saved to, its log directory, its metrics.jsonl, or a directory whose
            folders are runs.

    Raises:
        ConfigError: one is none of these, or two have the same label.
    """
    found: list[tuple[str | None, Path]] = []
    for word in words:
        label, _, place = ("", "", word) if Path(word).exists() else word.rpartition("=")
        log_dirs = _log_dirs(Path(place))
        if not log_dirs:
            raise ConfigError(
                f"--runs {word}: no {METRICS_FILE} in it, nor in a folder logs of it or of its folders. Name what a run saved to "
                "(--save) or its log directory, with LABEL= before it where it is to be called otherwise."
            )
        if label and len(log_dirs) > 1:
            raise ConfigError(f"--runs {word}: {len(log_dirs)} runs lie there, and a label is of one. Name each by itself.")
        found += [(label or None, log_dir) for log_dir in log_dirs]
    labels = _labels(found)
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"--runs: two runs are called {twice}. Give labels: --runs A=DIR B=DIR.")
    return [Run(label, log_dir) for label, (_, log_dir) in zip(labels, found, strict=True)]


def _log_dirs(place: Path) -> list[Path]:
    if place.is_file():
        return [place.parent] if place.name == METRICS_FILE else []
    for log_dir in (place, place / "logs"):
        if (log_dir / METRICS_FILE).is_file():
            return [log_dir]
    return sorted(path.parent for path in place.glob(f"*/logs/{METRICS_FILE}"))


def _labels(found: Sequence[tuple[str | None, Path]]) -> list[str]:
    """Those given, and names of the directories, with as many above as tell them apart."""
    parts = []
    for label, log_dir in found:
        save = log_dir.resolve()
        parts.append((label,) if label else (save.parent if save.name == "logs" else save).parts)
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return [short_label(label) for label in labels]
