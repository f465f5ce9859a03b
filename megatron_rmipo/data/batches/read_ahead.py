"""Global batches in order, laid out ahead of the model in worker processes."""

from __future__ import annotations

import atexit
import concurrent.futures
import copyreg
import io
import multiprocessing
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.runtime.worker_process import end_with_parent


class _Steps(torch.utils.data.Dataset[RankBatch]):
    """Number of a global batch, counted from ``consumed_pairs``, to its RankBatch, for DataLoader's workers."""

    def __init__(self, builder: BatchBuilder, order: PairOrder, batch_size: int, consumed_pairs: int, total_pairs: int) -> None:
        self.builder, self.order, self.batch_size = builder, order, batch_size
        self.consumed_pairs, self.total_pairs = consumed_pairs, total_pairs

    def __len__(self) -> int:
        return max(0, -(-(self.total_pairs - self.consumed_pairs) // self.batch_size))

    def __getitem__(self, step: int) -> RankBatch:
        first = self.consumed_pairs + step * self.batch_size
        return self.builder.build(self.order.batch(first, self.batch_size, self.total_pairs))


def iterate_batches(
    builder: BatchBuilder,
    order: PairOrder,
    *,
    batch_size: int,
    total_pairs: int,
    consumed_pairs: int = 0,
    num_workers: int = 0,
) -> Iterator[RankBatch]:
    """Global batches from ``consumed_pairs`` to the end of the run, for this rank, in order.

    Args:
        builder: cuts and lays out.
        order: which pairs come when.
        batch_size: global batch size, in pairs.
        total_pairs: pairs of the whole run; the last batch may be smaller.
        consumed_pairs: pairs of the run that were seen before.
        num_workers: processes that prepare batches ahead; 0 prepares them when asked for.
    """
    steps = _Steps(builder, order, batch_size, consumed_pairs, total_pairs)
    loader = torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        sampler=range(len(steps)),
        num_workers=num_workers,
        # As bytes: torch would send each tensor as an open file, and run out of them.
        collate_fn=_to_bytes,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_prepare_worker,
    )
    batches: Iterator[RankBatch] = map(pickle.loads, loader)
    if not num_workers:
        return batches
    # After the workers were started, so that it comes before torch's own farewell, which waits for each.
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return _read_ahead(batches)


def _read_ahead(batches: Iterator[RankBatch]) -> Iterator[RankBatch]:
    """The same batches, each received from its worker while the trainer is busy with the one before."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


def _to_bytes(batch: Any) -> bytes:
    """Pickled with NumPy arrays for tensors: torch's own form takes ten times as long, most of it when the trainer reads it."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _by_way_of_numpy}
    pickler.dump(batch)
    return stream.getvalue()


def _by_way_of_numpy(tensor: torch.Tensor) -> tuple[Any, tuple[np.ndarray]]:
    return torch.from_numpy, (tensor.numpy(),)


def _prepare_worker(worker: int) -> None:
    # Ignoring SIGTERM below, and perhaps blocked on a pipe that nobody reads any more, it would outlive a rank that is killed.
    end_with_parent()
    torch.set_num_threads(1)
    # torchrun signals a rank's whole process group, Slurm every process of a step; the rank needs its workers while it saves.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """What multiprocessing does with daemons when a process ends, with a signal that they do not ignore."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
