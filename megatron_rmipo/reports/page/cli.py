"""Command line of ``tools/report.py``: one page on one run, or on several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.reports.page.report import write_report
from megatron_rmipo.reports.page.run_files import find_log_dir

_DESCRIPTION = (
    "Write report.html: what a run was, how it went, what its model says of held-out pairs, and what to look at twice; one file "
    "that needs no network. With several runs their differences come first, and curves lie over each other."
)
REPORT_FILE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="report.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run (--save), or its log directory")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to write (default: report.html in the first run's log directory)"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="also show these results of evaluations; those in RUN/evaluation/ are shown anyway",
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and say where; returns the exit code."""
    arguments = build_parser().parse_args(argv)

    def write() -> None:
        output = arguments.output or find_log_dir(arguments.runs[0]) / REPORT_FILE
        write_report(arguments.runs, output, arguments.evaluation)
        print(f"report: {output}")

    return run_command(write, debug=arguments.debug)
