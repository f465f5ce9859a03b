"""Command line of ``tools/merge_adapter.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rmipo.checkpoint.flag_types import DTYPE_NAMES
from megatron_rmipo.checkpoint.merging.merged_model import merge_adapter
from megatron_rmipo.command import add_debug_flag, run_command

_DESCRIPTION = """\
Merge a PEFT adapter into the model that it belongs to and write that as a Hugging Face model directory, bit for bit as PEFT
merges them. One process, no GPU, one weight at a time in memory."""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="merge_adapter.py", description=_DESCRIPTION)
    parser.add_argument(
        "--load-adapter", required=True, type=Path, metavar="DIR", help="adapter_config.json and adapter_model.safetensors"
    )
    parser.add_argument("--base-hf", type=Path, metavar="DIR", help="its base model (default: the one that it names)")
    parser.add_argument("--save-hf", required=True, type=Path, metavar="DIR", help="new directory to write")
    parser.add_argument("--save-hf-dtype", choices=DTYPE_NAMES, help="dtype to store (default: as in the base model's files)")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)

    def merge() -> None:
        dtype = None if flags.save_hf_dtype is None else getattr(torch, flags.save_hf_dtype)
        merge_adapter(flags.load_adapter, flags.save_hf, base=flags.base_hf, dtype=dtype)
        print(f"{flags.save_hf} written.")

    return run_command(merge, debug=flags.debug, interrupted="interrupted; nothing was written")
