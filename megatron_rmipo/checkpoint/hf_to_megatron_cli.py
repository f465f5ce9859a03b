"""Command line of ``tools/convert_hf_to_megatron.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron
from megatron_rmipo.checkpoint.flag_types import DTYPE_NAMES
from megatron_rmipo.command import add_debug_flag, run_command

_DESCRIPTION = """\
Convert a Hugging Face model to a Megatron checkpoint (torch_dist) that any parallel layout can load. One
process, no GPU; the config and the tokenizer travel inside."""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="convert_hf_to_megatron.py", description=_DESCRIPTION)
    parser.add_argument(
        "--hf-model", required=True, type=Path, metavar="DIR", help="config.json, safetensors and tokenizer, or a PEFT adapter"
    )
    parser.add_argument(
        "--base-hf", type=Path, metavar="DIR", help="base model of an adapter in --hf-model (default: the one that it names)"
    )
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="new directory; the checkpoint is DIR/release")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype to store (default: as in the files)")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)

    def convert() -> None:
        path = convert_hf_to_megatron(flags.hf_model, flags.save, dtype=flags.dtype, base=flags.base_hf)
        print(f"{path} written. Train from it with --load {flags.save}.")

    return run_command(convert, debug=flags.debug, interrupted="interrupted; nothing was written")
