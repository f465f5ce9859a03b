"""How the commands of this package show how far they are and how they end: an exit code a kind of end, and a message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from megatron_rmipo.errors import RmipoError

DONE = 0
FAULT_OF_USER = 1
# EX_SOFTWARE and EX_TEMPFAIL of sysexits.h.
FAULT_OF_OURS = 70
STOPPED = 75
# What a shell makes of Ctrl-C: a signal came before there was anything to keep.
INTERRUPTED = 130
# Of a log file that shows how far something is.
_SECONDS_BETWEEN_LINES = 30.0


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors, and warnings of other packages")


def whole_number(least: int) -> Callable[[str], int]:
    """Type of a flag: a whole number, at least this."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return read


def number(most: float = sys.float_info.max, *, with_zero: bool = True) -> Callable[[str], float]:
    """Type of a flag: a number from 0, or above it, to this; a finite one."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no number") from None
        if not ((value >= 0 if with_zero else value > 0) and value <= most):
            upper = "" if most == sys.float_info.max else f", at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {'0 or above' if with_zero else 'above 0'}, finite{upper}")
        return value

    return read


def run_command(action: Callable[[], None], *, debug: bool = False, interrupted: str = "interrupted") -> int:
    """Run a tool and turn faults of its user into a message and an exit code.

    Args:
        action: the tool.
        debug: let faults through, with their traceback.
        interrupted: what Ctrl-C is answered with.

    Returns:
        0, 1 after a fault of the user, 130 after an interrupt.
    """
    try:
        action()
    except RmipoError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAULT_OF_USER
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return DONE


def progress_bar(title: str, total: int, unit: str, *, shown: bool, num_done: int = 0, stays: bool = True) -> tqdm[Any]:
    """A bar on stderr with rate and time left; in a log file a line now and then, none of what is soon done.

    Args:
        title: what is done.
        total: how much of it, in bytes (``B``) or what else is counted.
        unit: what is counted.
        shown: by one rank.
        num_done: how much was done before.
        stays: whether it is left on the terminal once it is full.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        desc=title,
        initial=num_done,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        disable=not shown,
        mininterval=0.5 if on_terminal else _SECONDS_BETWEEN_LINES,
        delay=0.5 if on_terminal else _SECONDS_BETWEEN_LINES,
        leave=stays or not on_terminal,
    )
