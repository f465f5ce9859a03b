"""The tables of a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.evaluation_file import Cell, EvaluationTable, read_evaluation
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.reports.held_out import NUM_PAIRS, Figure, mean_of, recorded
from megatron_rmipo.reports.page.numbers import MISSING, figure_text, short_number
from megatron_rmipo.reports.page.run_files import HeldOut, PageRun
from megatron_rmipo.reports.reporter import EVALUATIONS_FOLDER
from megatron_rmipo.reports.summary import METRIC_TITLES, paired_changes, read_kinds

# What says nothing of what was trained: how ranks share the work, and where files are, which differs from run to run by itself.
_LAYOUT = {field.name for field in dataclasses.fields(ParallelConfig)}
_PLACES = {"save", "save_hf", "log_dir", "tensorboard_dir", "reference_cache", "wandb_exp_name", "wandb_project"}
# What a table by kind shows.
_BY_KIND = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "gamma": "gamma"}
# Rows that kinds are read from are a few thousand; files of a whole corpus are left alone.
_MOST_BYTES_OF_ROWS = 64 * 2**20
_MOST_ROWS = 200


class Table(EvaluationTable):
    """A table as the page shows it; its title is empty where a heading says so."""

    @property
    def numeric(self) -> list[bool]:
        """Which columns are numbers, to the right: those without a text that begins with something else."""
        return [number > 0 and all(_is_number(row[number]) for row in self.rows) for number in range(len(self.columns))]

    def texts(self) -> list[list[str]]:
        """The cells as they are shown."""
        return [[_cell_text(cell) for cell in row] for row in self.rows]


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str) or cell == MISSING or cell[:2].lstrip("+-\u2212")[:1].isdigit()


def _cell_text(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else short_number(cell)


def evaluation_title(name: str) -> str:
    """What a set of held-out pairs is called."""
    return name or "held-out pairs"


def held_out_table(name: str, held_out: HeldOut) -> Table:
    """The first and the last evaluation of a set, with the change pair by pair."""
    before, after = held_out.records[0], held_out.records[-1]
    changes = paired_changes(held_out.first, held_out.last)
    only = before is after
    rows: list[list[Cell]] = []
    for metric, title in METRIC_TITLES.items():
        first, last = recorded(before, metric), recorded(after, metric)
        if last is None:
            continue
        if only:
            rows.append([title, figure_text(last)])
            continue
        change = None
        if first is not None:
            error = changes[metric].error if metric in changes else None
            change = figure_text(Figure(last.value - first.value, None, error), "+.3f")
        rows.append([title, figure_text(first), figure_text(last), change])
    steps = [f"step {record.get('step', '?'):,}" for record in (before, after)]
    count = after.get(NUM_PAIRS)
    note = f"n = {count:,} pairs. " if count else ""
    note += "\u00b1: standard error; a difference within two of them may be chance."
    columns = ["", steps[1]] if only else ["", *steps, "change"]
    return Table(evaluation_title(name), columns, rows, note)


def side_by_side(name: str, runs: Sequence[PageRun]) -> Table:
    """The last evaluation of a set, a column for each run that has it."""
    having = [run for run in runs if name in run.held_out]
    rows: list[list[Cell]] = []
    for metric, title in METRIC_TITLES.items():
        figures = [recorded(run.held_out[name].records[-1], metric) for run in having]
        if any(figure is not None for figure in figures):
            rows.append([title, *map(figure_text, figures)])
    ends = [run.held_out[name].records[-1] for run in having]
    rows.append(["pairs", *(end.get(NUM_PAIRS) for end in ends)])
    rows.append(["step", *(end.get("step") for end in ends)])
    note = "The last evaluation of each run. Rewards and losses of different objectives are in different units; accuracy is not."
    return Table(evaluation_title(name), ["", *(run.name for run in having)], rows, note)


def kinds_table(run: PageRun) -> Table | None:
    """The held-out pairs by the field ``kind`` of the rows they came from, where those are still there and have one."""
    held_out = run.held_out.get("")
    if held_out is None or not held_out.last:
        return None
    kinds = _kinds_of(run, len(held_out.last))
    if kinds is None:
        return None
    evaluations = (held_out.first, held_out.last) if len(held_out.first) == len(kinds) else (held_out.last,)
    metrics = [name for name in _BY_KIND if any(pair.get(name) is not None for pair in held_out.last)]
    words = ("before", "after")[-len(evaluations) :]
    rows: list[list[Cell]] = []
    for kind in sorted(set(kinds)):
        members = [[pair for pair, own in zip(side, kinds, strict=True) if own == kind] for side in evaluations]
        cells = [figure_text(mean_of(pairs, metric)) for metric in metrics for pairs in members]
        rows.append([kind, len(members[-1]), *cells])
    columns = ["kind", "pairs", *(f"{_BY_KIND[metric]} {word}" for metric in metrics for word in words)]
    return Table("By kind", columns, rows, "By the field kind of the rows that the pairs were prepared from.")


def _kinds_of(run: PageRun, count: int) -> list[str] | None:
    """The kinds of the first ``count`` pairs; None where the rows are not those of one whole data set, each of them kept."""
    data = (run.facts.get("data") or {}).get("held_out") or {}
    sources = [source for one in data.get("sets", []) for source in one.get("sources", [])]
    if len(sources) != 1 or sources[0].get("rows") or data.get("pairs") != data["sets"][0].get("num_pairs"):
        return None
    path = Path(sources[0].get("name", ""))
    if path.suffix != ".jsonl" or not path.is_file() or path.stat().st_size > _MOST_BYTES_OF_ROWS:
        return None
    try:
        kinds = read_kinds(path)
    except ConfigError:
        return None
    return kinds[:count] if len(kinds) == data["pairs"] >= count else None


def changed_settings(run: PageRun) -> Table:
    """The flags that are not as they are by default, for this objective."""
    usual = defaults_for(run.config)
    rows = [
        [name, _setting(value), _setting(usual[name]) if name in usual else None]
        for name, value in run.config.items()
        if value != usual.get(name)
    ]
    return Table("", ["flag", "this run", "default"], rows)


def all_settings(run: PageRun) -> Table:
    """Every flag."""
    return Table("", ["flag", "value"], [[name, _setting(value)] for name, value in run.config.items()])


def different_settings(runs: Sequence[PageRun]) -> Table:
    """The flags that the runs differ in; what trains another model comes first."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
    ordered = sorted(differing, key=lambda name: (name in _PLACES, name in _LAYOUT))
    rows = [[name, *(_setting(run.config[name]) if name in run.config else None for run in runs)] for name in ordered]
    return Table("", ["flag", *(run.name for run in runs)], rows)


def defaults_for(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every flag's default, that of the objective's options among them; of an objective that is not at hand without those."""
    try:
        return parse_arguments(["--objective", str(config.get("objective"))]).to_flat_dict()
    except (RmipoError, ImportError):
        return parse_arguments([]).to_flat_dict()


def _setting(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def evaluation_tables(path: Path) -> tuple[str, list[Table]]:
    """What an evaluation is called, and its tables.

    Raises:
        DataError: the file is not one of an evaluation.
    """
    found = read_evaluation(path)
    # More rows than a page can hold stay in the file.
    tables = [
        Table(table.title, table.columns, table.rows[:_MOST_ROWS], table.note + _left_out(len(table.rows), path))
        for table in found.tables
    ]
    return " \u00b7 ".join(filter(None, (found.title, found.model, found.made))), tables


def _left_out(count: int, path: Path) -> str:
    return f" The first {_MOST_ROWS} of {count:,} rows; all of them: {path}." if count > _MOST_ROWS else ""


def evaluation_files(run: PageRun) -> list[Path]:
    """Results of evaluations that lie beside a run's logs or its checkpoints."""
    folders = {run.log_dir / EVALUATIONS_FOLDER, run.log_dir.parent / EVALUATIONS_FOLDER}
    return sorted(path for folder in folders for path in folder.glob("*.json"))
