"""Real ranks over gloo on this machine, for what a benchmark measures of each."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Measurement = Callable[[argparse.Namespace, Path], dict[str, Any]]


def measure_ranks(measure: Measurement, size: int, options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """What ``measure(options, directory)`` returns on each of ``size`` ranks, by rank; plain values.

    Args:
        measure: a module-level function.
        size: number of ranks, each a process with one thread.
        options: of the command line.
        directory: for their files.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(measure, rank, size, port, options, directory)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{size} ranks: one failed; nothing measured")
    return [json.loads((directory / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _rank(measure: Measurement, rank: int, size: int, port: int, options: argparse.Namespace, directory: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    (directory / f"{rank}.json").write_text(json.dumps(measure(options, directory)), encoding="utf-8")
