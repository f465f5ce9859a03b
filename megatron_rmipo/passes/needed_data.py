"""Whether prepared data has what an objective reads, and fits the longest sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import LogpNeeds


def refuse_empty(store: PairStore, flag: str) -> None:
    """Refuse a data set without pairs.

    Raises:
        DataError: there are none in it.
    """
    if len(store) == 0:
        raise DataError(f"{flag} {store.prefix}: no pairs in it. Look at {store.prefix}.json for why rows were dropped.")


def refuse_mixed(stores: Sequence[PairStore]) -> None:
    """Unpaired rows count one response, pairs two: a mean over rows of both kinds would weigh responses unevenly.

    Raises:
        DataError: there are both.
    """
    kinds = {store.manifest.unpaired: store.prefix for store in stores}
    if len(kinds) > 1:
        raise DataError(
            f"{kinds[True]} holds unpaired rows, {kinds[False]} pairs; one run takes one kind. Train on them one after the "
            "other, or write the pairs as unpaired rows, too."
        )


def check_read(store: PairStore, flag: str, needs: LogpNeeds, objective: str, readers: Callable[[str], str]) -> None:
    """Refuse a data set without the responses or the columns that an objective reads.

    Args:
        store: the data set.
        flag: that named it.
        needs: of the objective.
        objective: how the user names it, such as ``--objective rmipo``: its name is the last word.
        readers: column -> the flags by which it is read.

    Raises:
        DataError: what is missing, and what would work.
    """
    kind = objective.rpartition(" ")[0]
    if needs.rejected and not store.manifest.has_rejected:
        raise DataError(
            f"{flag} {store.prefix}: supervised data, without rejected responses, which {objective} needs. "
            f"Train on preference pairs, or use {kind} sft."
        )
    if store.manifest.unpaired and not needs.unpaired:
        raise DataError(
            f"{flag} {store.prefix}: unpaired data, one response with a label a row, but {objective} needs "
            f"{'preference pairs' if needs.rejected else 'supervised rows or preference pairs'}. Prepare such data, or use "
            f"{kind} kto."
        )
    missing = [column for column in needs.columns if column not in store.manifest.pair_columns]
    if missing:
        told = " and ".join(dict.fromkeys(readers(column) for column in missing))
        raise DataError(
            f"{flag} {store.prefix}: no {' and no '.join(missing)} beside its pairs, to be read by {told}. Prepare the data "
            "from rows that have such a column, or train without reading it."
        )


def check_needed(stores: Sequence[PairStore], flag: str, needs: LogpNeeds, objective: str, readers: Callable[[str], str]) -> None:
    """Refuse data sets that are empty, of both kinds, or lack what an objective reads.

    Args:
        stores: the data sets that are read together.
        flag, needs, objective, readers: as of :func:`check_read`.

    Raises:
        DataError: what is missing, and what would work.
    """
    for store in stores:
        refuse_empty(store, flag)
        check_read(store, flag, needs, objective, readers)
    refuse_mixed(stores)


def check_length(store: PairStore, seq_length: int) -> None:
    """Refuse a data set with a pair that is too long.

    Raises:
        ConfigError: naming the longest prompt with one of its responses, and the value that would work.
    """
    if store.longest > seq_length:
        raise ConfigError(
            f"--seq-length {seq_length}: pair {store.longest_row()} of {store.prefix} is {store.longest} tokens long. "
            f"Use --seq-length {store.longest}, or prepare the data again with --seq-length {seq_length}."
        )
