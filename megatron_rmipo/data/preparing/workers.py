"""Rows -> token ids in batches, by any number of processes, in the order of the rows."""

from __future__ import annotations

import array
import collections
import concurrent.futures
import dataclasses
import gc
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.encode import LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, TokenizerSpec
from megatron_rmipo.data.layouts.reader import RowOptions, RowReader
from megatron_rmipo.data.preparing.rejects import Reject
from megatron_rmipo.data.reading.csv_files import BadRecord
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, excerpt
from megatron_rmipo.data.reading.sources import SourceRow, load_payload
from megatron_rmipo.errors import DataError
from megatron_rmipo.runtime.worker_process import end_with_parent

_ROWS_PER_BATCH = 128
_BATCHES_AHEAD_PER_WORKER = 4


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """What a worker makes of a batch of rows.

    Attributes:
        tokens: ids of all pairs behind one another, each prompt, chosen, rejected (empty where the row has none).
        lengths: ``[pairs, 3]``.
        values: the numbers beside them, ``[pairs, columns]``.
        num_rows: rows in the batch.
        num_truncated: pairs that were cut.
        rejects: rows left out.
        counts: what else happened to rows: see :class:`RowReader`; ``left_out`` of :class:`EncodedPair`.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    num_rows: int
    num_truncated: int
    rejects: list[Reject]
    counts: collections.Counter[str]


class BatchEncoder:
    """Rows -> token ids, in one process."""

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy, options: RowOptions) -> None:
        self._encoder = PairEncoder(tokenizer, template, policy)
        self._reader = RowReader(options)
        self._columns = options.values

    def __call__(self, rows: Sequence[SourceRow]) -> EncodedBatch:
        """Parse and encode rows, in order."""
        # The collector would look through all ids of a batch several times, for cycles that lists of integers cannot make.
        enabled = gc.isenabled()
        gc.disable()
        try:
            return self._encode(rows)
        finally:
            if enabled:
                gc.enable()

    def _encode(self, rows: Sequence[SourceRow]) -> EncodedBatch:
        self._reader.counts.clear()
        parsed = [self._parse(row) for row in rows]
        counts = self._reader.counts.copy()
        encoded = iter(self._encoder.encode([pair for pair in parsed if isinstance(pair, PreferencePair)]))
        tokens = array.array("I")  # takes a list of integers several times faster than NumPy does
        lengths: list[tuple[int, int, int]] = []
        values: list[list[float]] = []
        rejects: list[Reject] = []
        num_truncated = 0
        for row, pair in zip(rows, parsed, strict=True):
            result = next(encoded) if isinstance(pair, PreferencePair) else pair
            if isinstance(result, RowFault):
                rejects.append(_reject(row, result))
                continue
            for part in (result.prompt, result.chosen, result.rejected):
                tokens.fromlist(part)
            lengths.append((len(result.prompt), len(result.chosen), len(result.rejected)))
            assert isinstance(pair, PreferencePair)
            values.append([pair.values[column] for column in self._columns])
            num_truncated += result.truncated
            counts["left_out"] += result.left_out
        return EncodedBatch(
            np.array(tokens, dtype=np.int32),
            np.array(lengths, dtype=np.int32).reshape(-1, 3),
            np.array(values, dtype=np.float32).reshape(len(values), len(self._columns)),
            len(rows),
            num_truncated,
            rejects,
            +counts,
        )

    def _parse(self, row: SourceRow) -> PreferencePair | RowFault:
        try:
            return self._reader(load_payload(row.payload))
        except RowFault as fault:
            return fault


def _reject(row: SourceRow, fault: RowFault) -> Reject:
    payload = row.payload.cells if isinstance(row.payload, BadRecord) else row.payload
    payload = payload.decode("utf-8", errors="replace") if isinstance(payload, bytes) else payload
    return Reject(row.source, row.unit, row.number, fault.reason, fault.field, fault.message, excerpt(payload))


_worker_encoder: BatchEncoder | None = None


def _start_worker(spec: TokenizerSpec, template: ChatTemplate, policy: LengthPolicy, options: RowOptions) -> None:
    global _worker_encoder
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the one that started them answers it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as --workers says, not threads times processes
    _worker_encoder = BatchEncoder(PreferenceTokenizer(spec), template, policy, options)


def _work(rows: list[SourceRow]) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder(rows)


def _batches(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, _ROWS_PER_BATCH)):
        yield batch


def encode_batches(
    rows: Iterable[SourceRow],
    tokenizer: PreferenceTokenizer,
    template: ChatTemplate,
    policy: LengthPolicy,
    options: RowOptions,
    workers: int,
) -> Iterator[EncodedBatch]:
    """Encode rows in batches, in order, with ``workers`` processes (one: in this process).

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        yield from map(BatchEncoder(tokenizer, template, policy, options), _batches(rows))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process with the tokenizer's threads can hang
        initializer=_start_worker,
        initargs=(tokenizer.spec, template, policy, options),
    )
    waiting: collections.deque[concurrent.futures.Future[EncodedBatch]] = collections.deque()
    try:
        for batch in _batches(rows):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= workers * _BATCHES_AHEAD_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.BrokenExecutor:
        raise DataError(
            f"a worker process of --workers {workers} died, most likely killed for want of memory. Try fewer workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
