"""Command line of ``tools/summarize_run.py``: what runs did to their held-out pairs; RMiPO's margins as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.figures import margin_run
from megatron_rmipo.reports.pictures.margins import MarginRun, draw_schedule
from megatron_rmipo.reports.pictures.runs import Run
from megatron_rmipo.reports.pictures.style import save
from megatron_rmipo.reports.summary import summarize_run

_DESCRIPTION = (
    "Say what runs did to their held-out pairs: a table and a verdict each, from the logs. With --picture also draw the margins "
    "of runs of rmipo."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="summarize_run.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--log-dir", type=Path, nargs="+", required=True, metavar="DIR", help="directory of a run's metrics.jsonl; one or several"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="where the trained model lies, to be shown")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="jsonl the held-out pairs came from: group them by its field 'kind'"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="also draw rmipo's schedule, its margins and the gaps in log-probability (needs the plots extra)",
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and draw the picture; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _show(arguments), debug=arguments.debug)


def _show(arguments: argparse.Namespace) -> None:
    log_dirs: list[Path] = arguments.log_dir
    if len(log_dirs) > 1 and arguments.model is not None:
        raise ConfigError(f"--model {arguments.model}: of which of the {len(log_dirs)} runs? Leave it out, or name one.")
    for log_dir in log_dirs:
        if len(log_dirs) > 1:
            print(f"{'' if log_dir == log_dirs[0] else chr(10)}== {log_dir}\n")
        print(summarize_run(log_dir, arguments.rows))
    if arguments.model is not None:
        is_adapter = (arguments.model / "adapter_config.json").is_file()
        print(f"The trained {'adapter, in the form of PEFT' if is_adapter else 'model, in Hugging Face form'}: {arguments.model}")
    if arguments.picture is not None:
        save(draw_schedule([_margin_run(log_dir) for log_dir in log_dirs], with_gaps=True), arguments.picture)


def _margin_run(log_dir: Path) -> MarginRun:
    run_dir = log_dir.resolve()
    run_dir = run_dir.parent if run_dir.name == "logs" else run_dir
    # Runs of the example scripts have one name in different folders.
    return margin_run(Run("/".join(run_dir.parts[-2:]), log_dir))
