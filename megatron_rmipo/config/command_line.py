"""A command line's tokens as raw values of flags: what argparse does not see, or passes over in silence, is told here."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence

from megatron_rmipo.config.unknown_flags import describe_unknown_flag, flag_of
from megatron_rmipo.config.values import ValueType
from megatron_rmipo.config.yaml_file import Given
from megatron_rmipo.torchrun import launch_for_messages


class _EveryValue(argparse.Namespace):
    """What argparse finds, every value of a flag in the order of the command line: name -> list."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, [*getattr(self, name, []), value])


def tell_once(text: str) -> None:
    """Say a line of the first rank of a run, which all read the same flags."""
    if launch_for_messages().rank == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def normalize(argv: Sequence[str]) -> list[str]:
    """The arguments with hyphens in the names of flags, and negative numbers tied to their flag."""
    tokens: list[str] = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            tokens.append(flag.replace("_", "-") + equals + value)
        elif token.startswith("-") and _is_number(token) and tokens and tokens[-1].startswith("--") and "=" not in tokens[-1]:
            # argparse takes -1e-3 for a flag.
            tokens[-1] += "=" + token
        else:
            tokens.append(token)
    return tokens


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def read_line(
    parser: argparse.ArgumentParser, tokens: Sequence[str], flags: Mapping[str, ValueType]
) -> tuple[dict[str, Given], list[str]]:
    """Let argparse read a command line.

    A flag that is given again with another value is told of: the last one counts, so that flags can follow those of a script.

    Args:
        parser: knows the flags.
        tokens: the command line, normalized.
        flags: the value type of every flag.

    Returns:
        The flags with their raw values, and the faults found.

    Raises:
        ConfigError: a flag lacks its value.
    """
    tokens, problems = _without_values_of_switches(tokens, flags)
    values = _EveryValue()
    _, unknown = parser.parse_known_args(tokens, values)
    problems += [describe_unknown_flag(token, flags) for token in unknown if token.startswith("-")]
    if unknown and not problems:
        problems = [f"{unknown[0]!r} belongs to no flag"]
    for key, found in vars(values).items():
        if any(value != found[-1] for value in found):
            shown = ", then ".join(" ".join(value) if isinstance(value, list) else str(value) for value in found)
            tell_once(f"{flag_of(key)} is given more than once ({shown}); the last one counts")
    return {key: Given(found[-1], flag_of(key)) for key, found in vars(values).items()}, problems


def _without_values_of_switches(tokens: Sequence[str], flags: Mapping[str, ValueType]) -> tuple[list[str], list[str]]:
    """(the tokens without what follows a switch as if it were its value, the faults that this is)."""
    kept: list[str] = []
    problems: list[str] = []
    for token in tokens:
        flag, equals, value = token.partition("=")
        before = kept[-1] if kept and not token.startswith("-") else ""
        if equals and _is_switch(flag, flags):
            kept.append(flag)
        elif _is_switch(before, flags):
            flag, value = before, token
        else:
            kept.append(token)
            continue
        off = "leave it out" if flag.startswith("--no-") else f"--no-{flag.removeprefix('--')}"
        problems.append(f"{flag} {value}: {flag} is a switch and takes no value: {flag} for on, {off} for off")
    return kept, problems


def _is_switch(token: str, flags: Mapping[str, ValueType]) -> bool:
    key = token.removeprefix("--").replace("-", "_")
    names = (key, key.removeprefix("no_"))
    return token.startswith("--") and any(name in flags and flags[name].base is bool for name in names)
