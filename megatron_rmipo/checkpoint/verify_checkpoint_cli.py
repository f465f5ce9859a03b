"""Command line of ``tools/verify_checkpoint.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.checkpoint.flag_types import iteration_argument
from megatron_rmipo.checkpoint.megatron.digests import check_digests, damage
from megatron_rmipo.checkpoint.megatron.directory import (
    TRACKER_NAME,
    best_iteration,
    checkpoint_path,
    fault_of,
    iterations_of,
    nothing_complete,
    read_tracker,
)
from megatron_rmipo.checkpoint.megatron.record import AskedIteration, Iteration, read_record
from megatron_rmipo.checkpoint.megatron.torch_dist import check_archives
from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import CheckpointError

_DESCRIPTION = """\
Say of each checkpoint of a directory whether it is complete, can be read, and holds what was written, by the digests in its
record. Checkpoints without digests (of other programs, of older versions) are checked by the checksums inside their files. Exit
code 1 where one is not whole, or the tracker file names none that is there."""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="verify_checkpoint.py", description=_DESCRIPTION)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of checkpoints (iter_*, release)")
    parser.add_argument("--iteration", type=iteration_argument, metavar="N|best|release", help="this one alone (default: all)")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)
    return run_command(lambda: _verify(flags.directory, flags.iteration), debug=flags.debug)


def _verify(directory: Path, iteration: AskedIteration | None) -> None:
    iteration = best_iteration(directory) if iteration == "best" else iteration
    iterations: list[Iteration] = [iteration] if iteration is not None else _all_of(directory)
    num_faulty = 0
    for one in iterations:
        path = checkpoint_path(directory, one)
        try:
            text = _examine(path)
        except CheckpointError as error:
            num_faulty += 1
            text = f"NOT WHOLE: {error}"
        print(f"{path.name}: {text}", flush=True)
    if iteration is None:
        tracked = read_tracker(directory)
        if tracked not in iterations:
            says = "is missing or says nothing" if tracked is None else f"names {tracked}, which is not there"
            raise CheckpointError(f"{directory / TRACKER_NAME} {says}. Write the iteration to go on from into it.")
    if num_faulty:
        raise CheckpointError(f"{num_faulty} of {len(iterations)} checkpoints in {directory} cannot be used.")


def _all_of(directory: Path) -> list[Iteration]:
    iterations: list[Iteration] = sorted(iterations_of(directory))
    if (directory / "release").is_dir():
        iterations.insert(0, "release")
    if not iterations:
        raise CheckpointError(nothing_complete(directory))
    return iterations


def _examine(path: Path) -> str:
    """What is right with a checkpoint.

    Raises:
        CheckpointError: something is not.
    """
    fault = fault_of(path)
    if fault is not None:
        raise CheckpointError(fault)
    record = read_record(path)
    damaged = check_digests(path, record) if record is not None else []
    if damaged:
        raise CheckpointError(damage(path, damaged))
    check_archives(path)
    files = [item for item in path.rglob("*") if item.is_file()]
    found = f"complete, readable, {len(files)} files of {sum(item.stat().st_size for item in files) / 2**20:,.1f} MiB"
    if record is not None and record.digests:
        return f"{found}, digests right"
    writer = "another program" if record is None else "a version of megatron_rmipo that took none"
    return f"{found}, no digests (written by {writer})"
