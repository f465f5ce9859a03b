"""What the command lines of the conversion tools share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from megatron_rmipo.checkpoint.megatron.directory import Iteration
from megatron_rmipo.errors import RmipoError

DTYPE_NAMES = ("float32", "float16", "bfloat16")


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def iteration_argument(text: str) -> Iteration:
    """Value of ``--iteration``: a step, or ``release``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text == "release":
        return "release"
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'release'")
    return int(text)


def run_command(action: Callable[[], None], *, debug: bool) -> int:
    """Run a tool and turn faults of its user into a message and an exit code.

    Args:
        action: the tool.
        debug: let faults through, with their traceback.

    Returns:
        0, 1 after a fault of the user, 130 after an interrupt.
    """
    try:
        action()
    except RmipoError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
