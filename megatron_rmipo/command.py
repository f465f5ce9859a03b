"""What the command lines of one process share: faults of the user become a message and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from megatron_rmipo.errors import RmipoError


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


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
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
