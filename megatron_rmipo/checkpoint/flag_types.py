"""Values of flags that the conversion tools share."""

from __future__ import annotations

import argparse

from megatron_rmipo.checkpoint.megatron.record import Iteration

DTYPE_NAMES = ("float32", "float16", "bfloat16")


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
