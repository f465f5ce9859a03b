"""Preference data -> a :class:`~megatron_rmipo.data.pair_store.PairStore`, with any number of worker processes.

The main process reads rows and writes pairs, in the order of the input; workers parse, render and encode batches of rows. Which worker
takes which batch does not show in the result.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.chat import ChatTemplate, load_template
from megatron_rmipo.data.encode import LengthPolicy, PairEncoder
from megatron_rmipo.data.pair_store import Manifest, PairStoreWriter, check_output_prefix
from megatron_rmipo.data.progress import Progress
from megatron_rmipo.data.rows import FORMATS, PreferencePair, RowFault, excerpt, parse_columns, parse_row, recognise_format, rename_columns
from megatron_rmipo.data.sources import Source, SourceRow, first_rows, load_payload, open_source
from megatron_rmipo.data.tokenize import PreferenceTokenizer, TokenizerSpec, load_tokenizer
from megatron_rmipo.errors import DataError

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 128
_BATCHES_AHEAD_PER_WORKER = 4


@dataclasses.dataclass(frozen=True)
class PreprocessOptions:
    """What to preprocess and how; the flags of ``tools/preprocess_preferences.py`` by the same names."""

    input: tuple[str, ...]
    tokenizer_model: str
    output_prefix: str
    split: str | None = None
    format: str | None = None
    columns: str | None = None
    chat_template: str | None = None
    seq_length: int = 2048
    overlong: str = "left-truncate-prompt"
    max_prompt_length: int | None = None
    keep_ties: bool = False
    strict: bool = False
    overwrite: bool = False
    workers: int = 1
    log_interval: int = 1000


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row left out: where it stands, and why."""

    source: str
    number: int
    reason: str
    field: str
    message: str
    excerpt: str

    def __str__(self) -> str:
        where = f"{self.source}: row {self.number}" + (f", {self.field}" if self.field else "")
        return f"{where}: {self.message} [{self.reason}]"


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """What a worker makes of a batch of rows: ids of all pairs behind one another, their lengths ``[pairs, 3]``, and the rows left out."""

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    num_rows: int
    num_truncated: int
    rejects: list[Reject]


class BatchEncoder:
    """Rows -> token ids, in one process."""

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy, options: RowOptions) -> None:
        self._encoder = PairEncoder(tokenizer, template, policy)
        self._options = options

    def __call__(self, rows: Sequence[SourceRow]) -> EncodedBatch:
        """Parse and encode rows, in order."""
        parsed = [self._parse(row) for row in rows]
        encoded = iter(self._encoder.encode([pair for pair in parsed if isinstance(pair, PreferencePair)]))
        tokens: list[int] = []
        lengths: list[tuple[int, int, int]] = []
        rejects: list[Reject] = []
        num_truncated = 0
        for row, pair in zip(rows, parsed, strict=True):
            result = next(encoded) if isinstance(pair, PreferencePair) else pair
            if isinstance(result, RowFault):
                rejects.append(_reject(row, result))
                continue
            tokens += result.prompt + result.chosen + result.rejected
            lengths.append((len(result.prompt), len(result.chosen), len(result.rejected)))
            num_truncated += result.truncated
        return EncodedBatch(
            np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int32).reshape(-1, 3), len(rows), num_truncated, rejects
        )

    def _parse(self, row: SourceRow) -> PreferencePair | RowFault:
        try:
            columns = rename_columns(load_payload(row.payload), self._options.columns)
            return parse_row(columns, FORMATS[self._options.format], keep_ties=self._options.keep_ties)
        except RowFault as fault:
            return fault
        except ValueError as error:
            return RowFault("malformed", "", f"not a JSON object: {error}")


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """How rows are read: a key of ``FORMATS``, our column names -> theirs, and whether tied pairs stay."""

    format: str
    columns: dict[str, str]
    keep_ties: bool = False


def _reject(row: SourceRow, fault: RowFault) -> Reject:
    payload = row.payload.decode("utf-8", errors="replace") if isinstance(row.payload, bytes) else dict(row.payload)
    return Reject(row.source, row.number, fault.reason, fault.field, fault.message, excerpt(payload))


_worker_encoder: BatchEncoder | None = None


def _start_worker(spec: TokenizerSpec, template: ChatTemplate, policy: LengthPolicy, options: RowOptions) -> None:
    global _worker_encoder
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
    rows: Iterable[SourceRow], tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy, options: RowOptions, workers: int
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


def preprocess(options: PreprocessOptions) -> Manifest:
    """Read, encode and write a data set.

    Returns:
        The manifest written.

    Raises:
        DataError: something is wrong with the options, the input, the tokenizer or the disk; nothing is left at the prefix.
    """
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least 1.")
    if options.format is not None and options.format not in FORMATS:
        raise DataError(f"--format {options.format}: unknown; known: {', '.join(FORMATS)}.")
    policy = LengthPolicy(options.seq_length, options.overlong, options.max_prompt_length)
    columns = parse_columns(options.columns)
    check_output_prefix(options.output_prefix, overwrite=options.overwrite)
    sources = [open_source(name, options.split) for name in options.input]
    row_format = options.format or recognise_format(rename_columns(row, columns) for row in first_rows(sources))
    tokenizer = load_tokenizer(options.tokenizer_model)
    template = load_template(options.chat_template, tokenizer)
    PairEncoder(tokenizer, template, policy)  # refuses before any work what cannot work
    rows = RowOptions(row_format, columns, options.keep_ties)
    manifest = Manifest(
        tokenizer=tokenizer.info,
        tokenizer_name=options.tokenizer_model,
        template_name=template.name,
        template_hash=template.digest,
        seq_length=policy.seq_length,
        overlong=policy.overlong,
        max_prompt_length=policy.max_prompt_length,
        format=row_format,
        sources=[{"name": source.name, "bytes": source.size_bytes} for source in sources],
    )
    with (
        PairStoreWriter(options.output_prefix, tokenizer.info.vocab_size, overwrite=options.overwrite) as writer,
        RejectsFile(options.output_prefix) as rejects,
    ):
        counts = _write_all(sources, encode_batches(itertools.chain.from_iterable(sources), tokenizer, template, policy, rows, options.workers), writer, rejects, options)
        _check_outcome(len(writer), rejects, options)
        rejects.keep()
        return writer.finalize(dataclasses.replace(manifest, counts=counts))


def _write_all(
    sources: Sequence[Source], batches: Iterable[EncodedBatch], writer: PairStoreWriter, rejects: RejectsFile, options: PreprocessOptions
) -> dict[str, int]:
    """Write every batch as it comes; counts by what happened to the rows."""
    totals = [source.num_rows for source in sources]
    num_rows = num_truncated = 0
    with Progress(None if None in totals else sum(filter(None, totals)), options.log_interval) as progress:
        for batch in batches:
            num_rows += batch.num_rows
            num_truncated += batch.num_truncated
            for reject in batch.rejects:
                rejects.add(reject)
                if reject.reason == "too_long" and options.overlong == "error":
                    raise DataError(f"{reject}\nRaise --seq-length, or choose --overlong left-truncate-prompt or drop.")
            ends = np.cumsum(batch.lengths.sum(axis=1))
            for end, lengths in zip(ends.tolist(), batch.lengths.tolist(), strict=True):
                writer.add_flat(batch.tokens[end - sum(lengths) : end], lengths)
            progress.advance(batch.num_rows, len(writer), rejects.total)
    by_reason = {f"rejected/{reason}": count for reason, count in sorted(rejects.counts.items())}
    return {"rows": num_rows, "kept": len(writer), "truncated": num_truncated, "rejected": rejects.total, **by_reason}


def _check_outcome(num_kept: int, rejects: RejectsFile, options: PreprocessOptions) -> None:
    if num_kept and not (rejects.total and options.strict):
        return
    if not rejects.total:
        raise DataError(f"{', '.join(options.input)}: no rows.")
    rejects.keep()
    problem = "--strict: " if num_kept else "no row could be used: "
    by_reason = ", ".join(f"{count} {reason}" for reason, count in rejects.counts.most_common())
    examples = "\n".join(f"  {reject}" for reject in rejects.examples.values())
    raise DataError(f"{problem}{rejects.total} rows rejected ({by_reason}). The first of each kind:\n{examples}\nAll are listed in {rejects.path}.")


class RejectsFile:
    """``PREFIX.rejects.jsonl``: every row left out. Removed again unless :meth:`keep` is called; not made without rejects."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.rejects.jsonl")
        self._partial = Path(f"{prefix}.incomplete.rejects.jsonl")
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, Reject] = {}

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return self.counts.total()

    def __enter__(self) -> RejectsFile:
        try:
            self._stream = open(self._partial, "w", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self._partial}: could not be written ({error.strerror}).") from None
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        """List one row."""
        self.counts[reject.reason] += 1
        self.examples.setdefault(reject.reason, reject)
        self._stream.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")

    def keep(self) -> None:
        """Put the list in place; one left by an earlier run goes."""
        self._stream.close()
        if self.total:
            os.replace(self._partial, self.path)
        else:
            self.path.unlink(missing_ok=True)
