"""``python -m megatron_rmipo.objectives [NAME | --fields]``: which objectives there are, and what each costs and takes.

With ``--fields``, for who writes one: every field that an objective may declare, read and return.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Sequence

from megatron_rmipo.config.values import ValueType, field_types
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, Objective, PairLogps
from megatron_rmipo.objectives.metrics import likelihood_metrics
from megatron_rmipo.objectives.options import in_words
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective

_EACH_STEP = "(forward only, each step)"
# What an objective meets, in the order in which its methods do -> what that is for it.
_MET = {
    LogpNeeds: "declares, as its property needs",
    BatchLogps: "sees of the global batch, in prepare",
    PairLogps: "is called with, for the P pairs of a pack",
    LossOutput: "returns of these",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or one objective. Returns the exit code: 0 done, 1 there is no such objective."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rmipo.objectives",
        description="List the objectives and what each needs beyond the gradient pass, or the options of one.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="an objective, or package.module:Class of one of your own")
    parser.add_argument("--fields", action="store_true", help="what an objective may declare, read and return, field by field")
    given = parser.parse_args(argv)
    if given.fields and given.name is not None:
        parser.error("--fields is of no one objective: leave NAME out")
    try:
        print(fields() if given.fields else table() if given.name is None else description(given.name))
    except RmipoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def table() -> str:
    """All objectives with what each needs at default options, a line each."""
    rows = [("objective", "needs"), *((name, needs_in_words(_built(name).needs)) for name in OBJECTIVES)]
    return _columns(rows)


def fields() -> str:
    """Every field of what an objective declares, sees and returns, as the code describes it."""
    parts = []
    for kind, role in _MET.items():
        lines = [f"{kind.__name__}: what an objective {role}"]
        for name, text in described_fields(kind).items():
            lines += textwrap.wrap(f"{name}: {text}", 118, initial_indent="  ", subsequent_indent="      ")
        parts.append("\n".join(lines))
    beside = " ".join(_plain((inspect.getdoc(likelihood_metrics) or "").partition("\n\n")[2]).split())
    parts.append(
        "\n".join(
            [
                "Every run adds to the metrics, where they are not returned:",
                *textwrap.wrap(beside, 118, initial_indent="  ", subsequent_indent="  "),
            ]
        )
    )
    return "\n\n".join(parts)


def described_fields(kind: type) -> dict[str, str]:
    """Name of a dataclass's fields, several where they are described together -> what its docstring says of them."""
    listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n?^ {4}(?=\w)", listed, flags=re.MULTILINE)[1:]
    return {name: " ".join(_plain(text).split()) for name, _, text in (entry.partition(":") for entry in entries)}


def _plain(text: str) -> str:
    """Docstring markup as plain text."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")


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
    text = _plain(f"{name}: {inspect.cleandoc(type(objective).__doc__ or '')}{notation}")
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
