"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 240
# What is loaded asks whether there is CUDA. With this it asks the driver's library and starts nothing, so that ranks forked
# afterwards can use CUDA.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Ranks are forked from a server that has these loaded: importing them anew would take longer than most tests.
mp.set_forkserver_preload(
    ["transformers", "safetensors.torch", "megatron_rmipo.training.setup", "megatron_rmipo.checkpoint.hf.weights"]
)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = TIMEOUT_SECONDS) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh world; what each returned, by rank.

    The function is a module-level one and sets up its own process groups from the environment, as under torchrun. What it
    returns travels through a file (torch.save). A rank that raises fails the call with its traceback; ranks left waiting for it
    are ended, and so are all of a world that takes longer than ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        context = mp.get_context("forkserver")
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, function, args)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), seconds)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path, seconds: float) -> None:
    waited = 0.0
    while any(process.is_alive() for process in ranks):
        for process in ranks:
            process.join(0.1)
            waited += 0.1
            if process.exitcode:
                break
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if failed:
            # The others are given a moment, so that a failure they share is told by the first.
            texts = [path.read_text() for path in sorted(folder.glob("*.error"))]
            raise AssertionError(f"ranks {failed} failed\n" + "\n".join(texts))
        if waited > seconds:
            raise AssertionError(f"no end after {seconds} seconds")


def _rank(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def free_port() -> int:
    """A TCP port nobody listens on at the moment, below those that connections and other programs are given by themselves."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
