"""``python -m megatron_rmipo.objectives [NAME]``: which objectives there are, what each costs, and the options of one."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence

from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.objectives.base import LogpNeeds, Objective
from megatron_rmipo.objectives.registry import OBJECTIVES, find_objective


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or one objective. Returns the exit code: 0 done, 1 there is no such objective."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rmipo.objectives",
        description="List the objectives and what each needs beyond the gradient pass, or the options of one.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="an objective, or package.module:Class of one of your own")
    name = parser.parse_args(argv).name
    try:
        print(table() if name is None else description(name))
    except RmipoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def table() -> str:
    """All objectives with what each needs at default options, a line each."""
    rows = [("objective", "needs"), *((name, needs_in_words(_built(name).needs)) for name in OBJECTIVES)]
    return _columns(rows)


def description(name: str) -> str:
    """Formula, needs and options of one objective.

    Raises:
        ConfigError: there is no such objective, or it cannot be built from its defaults.
    """
    objective = _built(name)
    paragraph = inspect.getdoc(type(objective)) or ""
    options = [
        (f"--{field.name.replace('_', '-')}", default_in_words(objective.config, field.name), field.metadata.get("help", ""))
        for field in dataclasses.fields(objective.Config)
    ]
    listed = _columns([("option", "default", "meaning"), *options]) if options else "no options"
    head = paragraph.split("\n\n")[0].replace("``", "")
    return f"{name}: {head}\n\nneeds: {needs_in_words(objective.needs)}\n\n{listed}"


def needs_in_words(needs: LogpNeeds) -> str:
    """What is computed besides the gradient pass over both responses; ``-`` for nothing."""
    words = []
    if not needs.rejected:
        words.append("the chosen responses alone")
    if needs.unconditional is not None:
        words.append(f"log p(y), context {needs.unconditional}")
    if needs.reference:
        words.append("reference")
    if needs.mismatched:
        words.append("mismatched pairs")
    if needs.batch:
        words.append("the global batch beforehand")
    if needs.perturbation is not None:
        words.append("reference in memory")
    if needs.unpaired:
        words.append("takes unpaired rows")
    return ", ".join(words) or "-"


def default_in_words(config: object, name: str) -> str:
    """The value an option has where nothing is given, as a flag would have it; ``-`` where it means nothing then."""
    value = getattr(config, name)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _built(name: str) -> Objective:
    try:
        return find_objective(name)()
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
