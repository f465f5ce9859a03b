"""How the commands of this package end: one exit code a kind of end, and a message for what its user can mend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from megatron_rmipo.errors import RmipoError

DONE = 0
FAULT_OF_USER = 1
# EX_SOFTWARE and EX_TEMPFAIL of sysexits.h.
FAULT_OF_OURS = 70
STOPPED = 75
# What a shell makes of Ctrl-C: a signal came before there was anything to keep.
INTERRUPTED = 130


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors, and warnings of other packages")


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
