"""The parsers of all commands, and what each says of its flags."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from megatron_rmipo import entry
from megatron_rmipo.objectives.arguments import parse_arguments

# In place of a default.
REQUIRED = "required"
TOOLS = Path(__file__).resolve().parents[1] / "tools"


class Flag(NamedTuple):
    """What a parser knows of one of its flags, or of an argument without a name, as texts."""

    names: str
    value: str
    default: str
    help: str
    key: str


def parser_that_answers(command: Callable[[list[str]], object]) -> argparse.ArgumentParser:
    """The parser that a command has ``--help`` answered by, which is the one with all of its flags.

    Args:
        command: takes the arguments without the program's name.
    """
    asked: list[argparse.ArgumentParser] = []

    def note(self: argparse.ArgumentParser, *rest: Any) -> None:
        asked.append(self)

    with mock.patch.object(argparse.ArgumentParser, "print_help", note), contextlib.suppress(SystemExit):
        command(["--help"])
    (parser,) = asked
    return parser


def trainer_parser() -> argparse.ArgumentParser:
    """That of ``python -m megatron_rmipo.train``."""
    return parser_that_answers(parse_arguments)


def tool_parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(file name, parser) of every program in tools/."""
    for path in sorted(TOOLS.glob("*.py")):
        (name,) = re.findall(r"^from megatron_rmipo.entry import (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        (module,) = getattr(entry, name).args
        yield path.name, parser_that_answers(importlib.import_module(module).main)


def groups_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[Flag]]]:
    """(title, flags) of each group of a parser that has flags; ``--help`` is left out."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        if actions:
            yield group.title or "", [_flag(action, formatter) for action in actions]


def _flag(action: argparse.Action, formatter: argparse.HelpFormatter) -> Flag:
    text = formatter._expand_help(action) if action.help else ""
    told = re.search(r"\s*\(default: (?P<value>[^()]*(?:\([^()]*\))?[^()]*)\)$", text)
    default = REQUIRED if action.required and action.option_strings else told["value"] if told else ""
    names = ", ".join(_without_opposites(action.option_strings)) or str(action.metavar or action.dest)
    return Flag(names, _value(action), default, text[: told.start()] if told else text, action.dest)


def _without_opposites(names: Sequence[str]) -> list[str]:
    """``--x`` and ``--no-x`` of one switch as ``--[no-]x``."""
    opposites = {name for name in names if name.startswith("--no-") and f"--{name[5:]}" in names}
    return [f"--[no-]{name[2:]}" if f"--no-{name[2:]}" in opposites else name for name in names if name not in opposites]


def _value(action: argparse.Action) -> str:
    """What is written behind the flag; nothing for a switch."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    word = action.metavar
    if word is None:
        word = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    word = " ".join(word) if isinstance(word, tuple) else word
    return f"{word} ..." if action.nargs in ("+", "*") else word
