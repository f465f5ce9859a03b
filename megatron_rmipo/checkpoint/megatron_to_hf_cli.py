"""Command line of ``tools/convert_megatron_to_hf.py``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.checkpoint.flag_types import DTYPE_NAMES, iteration_argument
from megatron_rmipo.command import add_debug_flag, run_command

_DESCRIPTION = """\
Convert a Megatron checkpoint (torch_dist), trained at any layout, to a Hugging Face model directory. One that holds an adapter
alone, of a run with --lora-rank or of Megatron-Bridge, becomes an adapter of PEFT, which merge_adapter.py merges into its model.
One process, no GPU."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="convert_megatron_to_hf.py", description=_DESCRIPTION)
    parser.add_argument("--load", required=True, type=Path, metavar="DIR", help="directory of checkpoints (iter_*, release)")
    parser.add_argument("--save-hf", required=True, type=Path, metavar="DIR", help="new directory to write")
    parser.add_argument(
        "--iteration",
        type=iteration_argument,
        metavar="N|best|release",
        help="which checkpoint; best: that of --keep-best (default: the latest complete one)",
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype to store (default: as in the checkpoint)")
    parser.add_argument(
        "--hf-assets", type=Path, metavar="DIR", help="config.json and tokenizer, for checkpoints that carry none inside"
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=5e9,
        metavar="SIZE",
        help="size of a safetensors file, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--no-verify-checkpoint", action="store_true", help="do not check the digests of the checkpoint's files first"
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)

    def convert() -> None:
        path = convert_megatron_to_hf(
            flags.load,
            flags.save_hf,
            iteration=flags.iteration,
            dtype=flags.dtype,
            assets_dir=flags.hf_assets,
            max_shard_bytes=flags.max_shard_size,
            verify=not flags.no_verify_checkpoint,
        )
        print(f"{flags.save_hf} written from {path}.")

    return run_command(convert, debug=flags.debug, interrupted="interrupted; nothing was written")


def _size(text: str) -> float:
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return float(match[1]) * _UNITS[match[2].upper()]
