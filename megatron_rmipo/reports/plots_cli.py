"""Command line of ``tools/plot_runs.py``: the figures of the RMiPO paper, from any runs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.reports.pictures.figures import FIGURES, Drawing
from megatron_rmipo.reports.pictures.runs import find_runs
from megatron_rmipo.reports.pictures.style import FORMATS, save
from megatron_rmipo.reports.pictures.training import SMOOTHING, X_AXES

ALL = "all"
_DESCRIPTION = (
    "Draw a figure of the RMiPO paper from runs' logs. sensitivity (Figure 2): accuracy, and a judge's win rate, over beta and "
    "gamma; gaps (3): densities of the gaps in log-probability, first against last evaluation; wins (5): win rates; "
    "rewards (6): reward differences against the data's scores, with a distance; training (7): loss, margin, win rate and cost; "
    "schedule (8): rmipo's margins. all: each that the runs allow."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags. Those of single figures have no default here, so that one given in vain is noticed."""
    parser = argparse.ArgumentParser(prog="plot_runs.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("figure", choices=(*FIGURES, ALL), help="what to draw")
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        metavar="[LABEL=]DIR",
        help="what a run saved to, its log directory, its metrics.jsonl, a directory of runs, or the file of an evaluation",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the picture; with all, a directory")
    parser.add_argument("--format", nargs="+", choices=FORMATS, help="one or several (default: by FILE's extension, else png)")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="gaps, wins, rewards: the jsonl file the held-out pairs came from"
    )
    parser.add_argument("--category", metavar="FIELD", help="gaps, wins: the field of the rows that groups them (default: kind)")
    parser.add_argument(
        "--scores",
        metavar="FIELD",
        help="rewards: the field of the rows with the difference in score (default: their chosen_score less rejected_score, or "
        "what else public data call these; without rows the column margin of the prepared data)",
    )
    parser.add_argument(
        "--by", dest="wins_by", choices=("log-probs", "judge"), help="wins: of the chosen response, or as a judge's files say"
    )
    parser.add_argument("--x", dest="unit", choices=tuple(X_AXES), help="training: the axis (default: steps)")
    parser.add_argument(
        "--smoothing",
        type=float,
        metavar="SHARE",
        help=f"training: the part of it that curves are averaged over (default: {SMOOTHING}; 0: none)",
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _plot(arguments), debug=arguments.debug)


_FLAGS = {
    "rows": "--rows",
    "category": "--category",
    "scores": "--scores",
    "wins_by": "--by",
    "unit": "--x",
    "smoothing": "--smoothing",
}


def _plot(arguments: argparse.Namespace) -> None:
    drawing = _drawing(arguments)
    if arguments.figure == ALL:
        _plot_all(drawing, arguments.output, arguments.format or ["png"])
    else:
        figure, left_out = FIGURES[arguments.figure].plot(drawing)
        print(*(f"left out: {reason}" for reason in left_out), sep="\n", end="\n" if left_out else "")
        for path in _paths(arguments.output, arguments.format):
            save(figure, path)
            print(path)


def _drawing(arguments: argparse.Namespace) -> Drawing:
    """What is drawn from.

    Raises:
        ConfigError: a flag is of another figure, cannot be used, or lacks another one.
    """
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    figures = [kind for name, kind in FIGURES.items() if arguments.figure in (name, ALL)]
    for name in given:
        if not any(name in kind.reads for kind in figures):
            of = ", ".join(figure for figure, kind in FIGURES.items() if name in kind.reads)
            raise ConfigError(f"{_FLAGS[name]}: {arguments.figure} does not look at it; it is of {of}. Leave it out.")
    for name in ("category", "scores"):
        if name in given and "rows" not in given:
            raise ConfigError(f"{_FLAGS[name]} {given[name]}: a field of which rows? Name their file: --rows FILE.")
    if not 0.0 <= given.get("smoothing", 0.0) <= 1.0:
        raise ConfigError(f"--smoothing {given['smoothing']:g}: a part of the training, 0 (none) to 1.")
    files = [word for word in arguments.runs if word.endswith(".json")]
    if files and not (arguments.figure == ALL or given.get("wins_by") == "judge"):
        raise ConfigError(f"--runs {files[0]}: the file of an evaluation is drawn by plot_runs.py wins --by judge.")
    runs = [word for word in arguments.runs if word not in files]
    judged = [(label, Path(path)) for label, _, path in (word.rpartition("=") for word in files)]
    return Drawing(find_runs(runs) if runs else [], judged, **given)


def _plot_all(drawing: Drawing, directory: Path, formats: Sequence[str]) -> None:
    """Every figure that the runs allow, each in a file of its name; those left out are told with the reason.

    Raises:
        ConfigError: there is none, or one cannot be written.
    """
    wanted = {name: (name, drawing) for name in FIGURES}
    wanted["wins_judge"] = ("wins", dataclasses.replace(drawing, wins_by="judge"))
    num_drawn = 0
    for file, (name, of) in wanted.items():
        try:
            figure, left_out = FIGURES[name].plot(of)
        except (ConfigError, DataError) as error:
            print(f"{file}: not drawn. {error}")
            continue
        for reason in left_out:
            print(f"{file}: left out: {reason}")
        num_drawn += 1
        for form in formats:
            path = directory / f"{file}.{form}"
            save(figure, path)
            print(path)
    if not num_drawn:
        raise ConfigError("these runs allow no figure; above is what each lacks.")


def _paths(output: Path, formats: Sequence[str] | None) -> list[Path]:
    """Where the picture goes: a name with an extension of ours is of that format, unless formats are named."""
    has_format = output.suffix.lstrip(".").lower() in FORMATS
    if formats is None:
        # Added, not put in place of a suffix: a name may have a dot.
        return [output if output.suffix else Path(f"{output}.png")]
    base = output.with_suffix("") if has_format else output
    return [Path(f"{base}.{form}") for form in formats]
