"""Values of flags that the conversion tools share."""

from __future__ import annotations

import argparse

from megatron_rmipo.checkpoint.megatron.record import AskedIteration

DTYPE_NAMES = ("float32", "float16", "bfloat16")


def iteration_argument(text: str) -> AskedIteration:
    """Value of ``--iteration``: a step, ``release``, or ``best``, the checkpoint that ``--keep-best`` of a run keeps.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    if text == "release":
        return "release"
    if text == "best":
        return "best"
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'best' nor 'release'")
    return int(text)
