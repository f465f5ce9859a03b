"""Preference data -> a :class:`~megatron_rmipo.data.store.pair_store.PairStore`, with any number of worker processes.

The main process reads rows and writes pairs, in the order of the input; workers parse, render and encode batches of rows. Which
worker takes which batch does not show in the result.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence

from megatron_rmipo.data.encoding.carried import chat_form
from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.tokenize import BOS_POLICIES, PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.layouts.reader import RowOptions
from megatron_rmipo.data.layouts.scores import ON_INVERTED
from megatron_rmipo.data.layouts.settle import settle_reading, unread_note
from megatron_rmipo.data.preparing.rejects import Reject, RejectsFile
from megatron_rmipo.data.preparing.row_progress import RowProgress
from megatron_rmipo.data.preparing.workers import EncodedBatch, encode_batches
from megatron_rmipo.data.reading.columns import column_names, parse_columns, require_columns
from megatron_rmipo.data.reading.sources import Source, first_rows, open_sources
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
    bos: str = BOS_POLICIES[0]
    template_date: str | None = None
    seq_length: int = 2048
    overlong: str = "left-truncate-prompt"
    max_prompt_length: int | None = None
    ignore_columns: str | None = None
    winner_values: str | None = None
    keep_ties: bool = False
    on_inverted: str = "keep"
    strict: bool = False
    overwrite: bool = False
    workers: int = 1
    log_interval: int = 1000


def preprocess(options: PreprocessOptions, tokenizer: PreferenceTokenizer | None = None, *, tell_unread: bool = True) -> Manifest:
    """Read, encode and write a data set.

    Args:
        options: what to preprocess and how.
        tokenizer: that of ``options.tokenizer_model`` where it is loaded already; None loads it.
        tell_unread: whether columns that nobody reads are told, with the flags that settle it; the manifest names them anyway.

    Returns:
        The manifest written.

    Raises:
        DataError: something is wrong with the options, the input, the tokenizer or the disk; nothing is left at the prefix.
    """
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least 1.")
    for flag, value, known in (("format", options.format, FORMATS), ("on-inverted", options.on_inverted, ON_INVERTED)):
        if value is not None and value not in known:
            raise DataError(f"--{flag} {value}: unknown; known: {', '.join(known)}.")
    policy = LengthPolicy(options.seq_length, options.overlong, options.max_prompt_length)
    columns = parse_columns(options.columns)
    check_output_prefix(options.output_prefix, overwrite=options.overwrite)
    sources = [source for name in options.input for source in open_sources(name, options.split, column_names(columns))]
    for note in itertools.chain.from_iterable(source.notes for source in sources):
        print(f"note: {note}", file=sys.stderr)
    peeked = first_rows(sources)
    require_columns(peeked, columns)
    rows = settle_reading(
        peeked,
        columns,
        form=options.format,
        ignore_columns=options.ignore_columns,
        winner_values=options.winner_values,
        keep_ties=options.keep_ties,
        on_inverted=options.on_inverted,
    )
    if rows.unread and tell_unread:
        print(f"note: {unread_note(rows.unread, rows.format)}", file=sys.stderr)
    tokenizer = tokenizer or load_tokenizer(options.tokenizer_model)
    template = load_template(options.chat_template, tokenizer, bos=options.bos, date=options.template_date)
    for note in template.notes:
        print(f"note: {note}", file=sys.stderr)
    PairEncoder(tokenizer, template, policy)  # refuses before any work what cannot work
    manifest = Manifest(
        tokenizer=tokenizer.info,
        tokenizer_name=options.tokenizer_model,
        template_name=template.name,
        template_hash=template.digest,
        template_date=template.date_written,
        chat=chat_form(template, tokenizer, official=policy.overlong == "official"),
        bos=template.bos,
        seq_length=policy.seq_length,
        overlong=policy.overlong,
        max_prompt_length=policy.max_prompt_length,
        format=rows.format,
        on_inverted=rows.on_inverted,
        sources=[source.describe() for source in sources],
    )
    with (
        PairStoreWriter(
            options.output_prefix,
            tokenizer.info.vocab_size,
            unpaired=rows.format == "unpaired",
            columns=rows.values,
            overwrite=options.overwrite,
        ) as writer,
        RejectsFile(options.output_prefix) as rejects,
    ):
        all_rows = itertools.chain.from_iterable(sources)
        batches = encode_batches(all_rows, tokenizer, template, policy, rows, options.workers)
        counts = _write_all(sources, batches, writer, rejects, options)
        unread = _name_unread(counts, rows, tell=tell_unread)
        _check_outcome(len(writer), rejects, options)
        rejects.complete()
        # The list goes with the files, which are all on the disk then: where that fails, the earlier data set keeps its own.
        return writer.finalize(dataclasses.replace(manifest, counts=counts, unread_columns=unread), rejects.keep)


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
    of_rows: collections.Counter[str] = collections.Counter()
    with RowProgress(None if None in totals else sum(filter(None, totals)), options.log_interval) as progress:
        for batch in batches:
            num_rows += batch.num_rows
            num_truncated += batch.num_truncated
            of_rows += batch.counts
            for reject in batch.rejects:
                rejects.add(reject)
                _refuse_reject(reject, options)
            writer.add_all(batch.tokens, batch.lengths, batch.values)
            progress.advance(batch.num_rows, len(writer), rejects.total)
    by_reason = {f"rejected/{reason}": count for reason, count in sorted(rejects.counts.items())}
    return {"rows": num_rows, "kept": len(writer), "truncated": num_truncated, "rejected": rejects.total, **by_reason, **of_rows}


def _refuse_reject(reject: Reject, options: PreprocessOptions) -> None:
    """Stop at a row where the options say that such a row is an error."""
    if reject.reason == "too_long" and options.overlong == "error":
        raise DataError(f"{reject}\nRaise --seq-length, or choose --overlong left-truncate-prompt or drop.")
    if reject.reason == "inverted" and options.on_inverted == "error":
        raise DataError(f"{reject}\nCorrect the row, or choose --on-inverted keep, drop or swap.")


def _name_unread(counts: dict[str, int], rows: RowOptions, *, tell: bool) -> list[str]:
    """Move the columns that nobody read out of the counts: all of them, those that the first rows did not show named now."""
    later = [name.removeprefix("unread/") for name in counts if name.startswith("unread/")]
    for name in later:
        del counts[f"unread/{name}"]
    if later and tell:
        print(f"note: {unread_note(later, rows.format)}", file=sys.stderr)
    return sorted({*rows.unread, *later})


def _check_outcome(num_kept: int, rejects: RejectsFile, options: PreprocessOptions) -> None:
    if num_kept and not (rejects.total and options.strict):
        return
    rejects.keep_failed()
    problem = "--strict: " if num_kept else "no row could be used: "
    by_reason = ", ".join(f"{count} {reason}" for reason, count in rejects.counts.most_common())
    examples = "\n".join(f"  {reject}" for reject in rejects.examples.values())
    raise DataError(
        f"{problem}{rejects.total} rows rejected ({by_reason}). The first of each kind:\n{examples}\n"
        f"All are listed in {rejects.failed_path}."
    )
