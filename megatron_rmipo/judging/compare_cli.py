"""Command line of ``tools/compare_evaluations.py``: evaluations of a model, beside those of another one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.evaluation_file import Evaluation, write_evaluation, write_whole
from megatron_rmipo.judging.results import format_table
from megatron_rmipo.judging.side_by_side import read_evaluations, side_by_side

_DESCRIPTION = (
    "Put evaluations of a model beside those of the model it was made from, number by number. Reads what evaluate_pairs.py, "
    "generate_answers.py and judge_pairwise.py write, and what lm-eval does. Without --base: the tables of the model alone."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="compare_evaluations.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="PATH", help="evaluations, or folders of them")
    parser.add_argument("--base", type=Path, nargs="+", metavar="PATH", help="those of the model to compare with")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.md and PREFIX.json")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the tables; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _compare(arguments), debug=arguments.debug)


def _compare(arguments: argparse.Namespace) -> None:
    model = read_evaluations(arguments.model, "--model")
    name = model[0].model
    if arguments.base is None:
        kinds = {one.kind for one in model}
        tables = [table for one in model for table in one.tables]
        kind, title = (kinds.pop(), model[0].title) if len(kinds) == 1 else ("side_by_side", f"Evaluations of {name}")
        details: dict[str, Any] = {"evaluations": [dict(one.details) for one in model]}
    else:
        base = read_evaluations(arguments.base, "--base")
        tables, kind, title = side_by_side(model, base), "side_by_side", f"{name} beside {base[0].model}"
        details = {"model": [one.model for one in model], "base": [one.model for one in base]}
    print("\n\n".join(format_table(table) for table in tables if not table.is_detail))
    # Added, not put in place of a suffix: a name may have a dot.
    prefix = str(arguments.output)
    write_whole(Path(prefix + ".md"), "\n\n".join(map(format_table, tables)) + "\n")
    write_evaluation(Path(prefix + ".json"), Evaluation(kind, title, name, tables, details))
