"""``python -m megatron_rmipo.objectives [NAME]``: which objectives there are, what each costs, and the options of one."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence

from megatron_rmipo.config.values import ValueType, field_types
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.objectives.base import LogpNeeds, Objective
from megatron_rmipo.objectives.options import in_words
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective

_EACH_STEP = "(forward only, each step)"


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
    """Formula, notation, needs and options of one objective.

    Raises:
        ConfigError: there is no such objective, or it cannot be built from its defaults.
    """
    objective = _built(name)
    config = objective.config
    kinds = field_types(type(config))
    options = [
        (_flag(field.name, kinds[field.name]), default_in_words(config, field.name), field.metadata.get("help", ""))
        for field in dataclasses.fields(config)
        if field.name in kinds
    ]
    listed = _columns([("option", "default", "meaning"), *options]) if options else "no options"
    notation = "".join(f"\n\n{part}" for part in _module_doc(objective).split("\n\n") if part.startswith("Notation: "))
    text = f"{name}: {inspect.cleandoc(type(objective).__doc__ or '')}{notation}".replace("``", "")
    return f"{text}\n\nneeds: {needs_in_words(objective.needs)}\n\n{listed}"


def needs_in_words(needs: LogpNeeds) -> str:
    """What is computed besides the gradient pass over both responses; ``-`` for nothing."""
    words = []
    if not needs.rejected:
        words.append("the chosen responses alone")
    if needs.unconditional is not None:
        words.append(f"log p(y), context {needs.unconditional} {_EACH_STEP}")
    if needs.reference:
        words.append("reference (log-probs computed once)")
    if needs.mismatched:
        words.append(f"mismatched pairs {_EACH_STEP}")
    if needs.batch:
        words.append(f"the global batch beforehand {_EACH_STEP}")
    if needs.perturbation is not None:
        words.append("reference in memory")
    if needs.columns:
        words.append(f"each pair's {' and '.join(needs.columns)} from the data")
    if needs.unpaired:
        words.append("takes unpaired rows")
    return ", ".join(words) or "-"


def default_in_words(config: object, name: str) -> str:
    """The value an option has where nothing is given, as a flag would have it; ``-`` where it means nothing then."""
    value = getattr(config, name)
    if value is None:
        return "-"
    return in_words(value)


def _flag(name: str, kind: ValueType) -> str:
    """``--beta``; of a switch, ``--[no-]length-normalization``."""
    return f"--{'[no-]' if kind.base is bool else ''}{name.replace('_', '-')}"


def _module_doc(objective: Objective) -> str:
    return inspect.getdoc(inspect.getmodule(type(objective))) or ""


def _built(name: str) -> Objective:
    try:
        return build_objective(name, {})
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
