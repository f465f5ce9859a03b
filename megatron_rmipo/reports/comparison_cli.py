"""Command line of ``tools/compare_runs.py``: several runs as tables, and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.comparison import name_without_seed, read_row
from megatron_rmipo.reports.comparison_tables import VIEWS, Table, compare_runs, write_csv
from megatron_rmipo.reports.pictures.comparison import draw_comparison
from megatron_rmipo.reports.pictures.style import save

_DESCRIPTION = (
    "Put several runs side by side, from their logs: tables on the screen and in --output, and a picture. Folders RUN.seed-N are "
    "further seeds of the row RUN: shown are the means, with standard errors over the seeds."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="compare_runs.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="directory of the runs, a folder (--save) each")
    parser.add_argument(
        "--table",
        nargs="+",
        action="append",
        metavar=("TITLE", "[LABEL=]RUN"),
        help="a table of these runs; may be given several times, and a run may stand in several (default: one table of all runs)",
    )
    parser.add_argument(
        "--view",
        choices=tuple(VIEWS),
        default="objectives",
        help="margins: accuracy, margin, gamma, loss; objectives: how it learned, what it cost (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="also write PREFIX.md and PREFIX.csv (all columns)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the runs (needs the plots extra)")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the tables; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _compare(arguments.runs, _parse_tables(arguments), arguments), debug=arguments.debug)


def _compare(directory: Path, tables: Sequence[Table], arguments: argparse.Namespace) -> None:
    names = dict.fromkeys(run for table in tables for _, run in table.rows)
    results = {name: read_row(directory, name) for name in names}
    text = compare_runs(tables, results, arguments.view)
    print(text)
    if arguments.output is not None:
        # Added, not put in place of a suffix: a name may have a dot.
        prefix = str(arguments.output)
        try:
            Path(prefix + ".md").write_text(text + "\n", encoding="utf-8")
            with Path(prefix + ".csv").open("w", encoding="utf-8", newline="") as file:
                write_csv(file, tables, results)
        except OSError as error:
            raise ConfigError(f"--output {prefix}: cannot be written: {error.strerror}.") from error
    if arguments.picture is not None:
        save(draw_comparison(results, arguments.view), arguments.picture)


def _parse_tables(arguments: argparse.Namespace) -> list[Table]:
    if arguments.table is None:
        found = sorted({name_without_seed(path.name) for path in arguments.runs.glob("*") if (path / "logs").is_dir()})
        if not found:
            raise ConfigError(f"--runs {arguments.runs}: no folder in it is a run (has logs).")
        return [Table(arguments.runs.name, [(name, name) for name in found])]
    tables = []
    for title, *rows in arguments.table:
        if not rows:
            raise ConfigError(f"--table {title!r}: it names no run. Give the title and then [LABEL=]RUN, one or more.")
        tables.append(Table(title, [_label_and_run(row) for row in rows]))
    return tables


def _label_and_run(row: str) -> tuple[str, str]:
    label, _, run = row.rpartition("=")
    return label or run, run
