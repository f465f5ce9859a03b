"""What every benchmark does with its figures: a table or a line of JSON, lines of CSV, goals held against what was measured."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
# Beside the file of figures; docs/performance.md reads it.
GOALS_FILE = "goals.csv"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that was to be reached.

    Attributes:
        name: what is measured, with its unit.
        limit: the most it may be, or with ``at_least`` the least.
        measured: what it was; NaN reaches nothing.
    """

    name: str
    limit: float
    measured: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it was."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        """One line: name, goal, measured, and whether it was missed."""
        goal = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return f"{self.name:<72} goal {goal:<9} measured {self.measured:<9.5g} {'reached' if self.reached else 'MISSED'}"


def add_report_options(parser: argparse.ArgumentParser, default_csv: Path) -> None:
    """``--csv``, ``--json`` and ``--check``."""
    parser.add_argument("--csv", type=Path, default=default_csv, help="file to append to (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON with all figures instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed, naming it")


def environment() -> dict[str, Any]:
    """Date, commit, device and versions."""
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformers": version("transformers"),
    }


def commit() -> str:
    """The commit, ``-dirty`` where files other than our entries differ from it; empty without git or a repository."""
    try:
        described = _git("describe", "--always").stdout.strip()
        # Only entries: lengths/*.csv is read, and says what was measured.
        differs = _git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude,glob)*.csv").returncode
    except OSError:
        return ""
    return f"{described}-dirty" if described and differs else described


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=FOLDER)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Entries in the order they were made; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to a CSV file. Columns that one side does not have stay empty there."""
    write_rows(path, read_rows(path), rows)


def write_rows(path: Path, earlier: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file of entries that it had, as they were read, and of new ones."""
    entries: list[Mapping[str, Any]] = [*earlier]
    entries += [{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    os.replace(partial, path)


def report(
    options: argparse.Namespace,
    benchmark: str,
    table: str,
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Goal],
    earlier: Sequence[Mapping[str, Any]] | None = None,
) -> int:
    """Print the table (or JSON), append the rows and the goals, say which goals were reached.

    Args:
        options: with those of :func:`add_report_options`.
        benchmark: its name, for JSON.
        table: for people.
        rows: what was measured and under which settings, one per line of CSV; the environment is added.
        goals: those that these settings are meant for.
        earlier: entries of the file before this run, where the run has written some of its own already, which these replace.

    Returns:
        The exit code: 1 where a file cannot be written, or with ``--check`` and a goal that was missed.
    """
    facts = environment()
    verdicts = [dataclasses.asdict(goal) | {"reached": goal.reached} for goal in goals]
    # Shown first: what took long to measure is not lost where it cannot be written.
    if options.json:
        print(json.dumps({"benchmark": benchmark, **facts, "rows": list(rows), "goals": verdicts}))
    else:
        print("\n".join([table, *map(str, goals)]))
    try:
        write_rows(options.csv, read_rows(options.csv) if earlier is None else earlier, [facts | dict(row) for row in rows])
        if goals:
            append_rows(options.csv.with_name(GOALS_FILE), [facts | {"benchmark": benchmark} | verdict for verdict in verdicts])
    except OSError as error:
        print(f"error: --csv {options.csv}: not appended: {error}", file=sys.stderr)
        return 1
    if not options.json:
        print(f"appended to {options.csv}")
    if not options.check:
        return 0
    if not goals:
        print("--check: no goal is set for these settings", file=sys.stderr)
        return 1
    missed = [goal for goal in goals if not goal.reached]
    for goal in missed:
        print(f"goal missed: {goal}", file=sys.stderr)
    return 1 if missed else 0
