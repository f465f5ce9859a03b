"""Preference data -> a :class:`~megatron_rmipo.data.store.pair_store.PairStore`, with any number of worker processes.

The main process reads rows and writes pairs, in the order of the input; workers parse, render and encode batches of rows. Which
worker takes which batch does not show in the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.preparing.rejects import RejectsFile
from megatron_rmipo.data.preparing.row_progress import RowProgress
from megatron_rmipo.data.preparing.workers import EncodedBatch, RowOptions, encode_batches, value_columns
from megatron_rmipo.data.reading.formats import FORMATS, recognise_format
from megatron_rmipo.data.reading.rows import parse_columns, rename_columns, require_columns
from megatron_rmipo.data.reading.sources import Source, first_rows, open_source
from megatron_rmipo.data.store.pair_store import Manifest, PairStoreWriter, check_output_prefix
from megatron_rmipo.errors import DataError


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


def preprocess(options: PreprocessOptions, tokenizer: PreferenceTokenizer | None = None) -> Manifest:
    """Read, encode and write a data set.

    Args:
        options: what to preprocess and how.
        tokenizer: that of ``options.tokenizer_model`` where it is loaded already; None loads it.

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
    for note in filter(None, (source.note for source in sources)):
        print(f"note: {note}", file=sys.stderr)
    peeked = list(first_rows(sources))
    require_columns(peeked, columns)
    row_format = options.format or recognise_format(rename_columns(row, columns) for row in peeked)
    tokenizer = tokenizer or load_tokenizer(options.tokenizer_model)
    template = load_template(options.chat_template, tokenizer)
    PairEncoder(tokenizer, template, policy)  # refuses before any work what cannot work
    rows = RowOptions(row_format, columns, options.keep_ties)
    rows = dataclasses.replace(rows, values=value_columns(peeked, rows))
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
        PairStoreWriter(
            options.output_prefix,
            tokenizer.info.vocab_size,
            unpaired=row_format == "unpaired",
            columns=rows.values,
            overwrite=options.overwrite,
        ) as writer,
        RejectsFile(options.output_prefix) as rejects,
    ):
        all_rows = itertools.chain.from_iterable(sources)
        batches = encode_batches(all_rows, tokenizer, template, policy, rows, options.workers)
        counts = _write_all(sources, batches, writer, rejects, options)
        _check_outcome(len(writer), rejects, options)
        rejects.complete()
        finished = writer.finalize(dataclasses.replace(manifest, counts=counts))
        rejects.keep()  # after the data set: where that fails, the earlier one keeps its list
        return finished


def _write_all(
    sources: Sequence[Source],
    batches: Iterable[EncodedBatch],
    writer: PairStoreWriter,
    rejects: RejectsFile,
    options: PreprocessOptions,
) -> dict[str, int]:
    """Write every batch as it comes; counts by what happened to the rows."""
    totals = [source.num_rows for source in sources]
    num_rows = num_truncated = 0
    with RowProgress(None if None in totals else sum(filter(None, totals)), options.log_interval) as progress:
        for batch in batches:
            num_rows += batch.num_rows
            num_truncated += batch.num_truncated
            for reject in batch.rejects:
                rejects.add(reject)
                if reject.reason == "too_long" and options.overlong == "error":
                    raise DataError(f"{reject}\nRaise --seq-length, or choose --overlong left-truncate-prompt or drop.")
            writer.add_all(batch.tokens, batch.lengths, batch.values)
            progress.advance(batch.num_rows, len(writer), rejects.total)
    by_reason = {f"rejected/{reason}": count for reason, count in sorted(rejects.counts.items())}
    return {"rows": num_rows, "kept": len(writer), "truncated": num_truncated, "rejected": rejects.total, **by_reason}


def _check_outcome(num_kept: int, rejects: RejectsFile, options: PreprocessOptions) -> None:
    if num_kept and not (rejects.total and options.strict):
        return
    if not rejects.total:
        raise DataError(f"{', '.join(options.input)}: no rows.")
    rejects.keep_failed()
    problem = "--strict: " if num_kept else "no row could be used: "
    by_reason = ", ".join(f"{count} {reason}" for reason, count in rejects.counts.most_common())
    examples = "\n".join(f"  {reject}" for reject in rejects.examples.values())
    raise DataError(
        f"{problem}{rejects.total} rows rejected ({by_reason}). The first of each kind:\n{examples}\n"
        f"All are listed in {rejects.failed_path}."
    )
