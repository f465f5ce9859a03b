"""Whether prepared data has what an objective reads, and fits the longest sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_rmipo.data.store.collection import PairCollection
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
        objective: its name.
        readers: column -> the flags by which it is read.

    Raises:
        DataError: what is missing, and what would work.
    """
    if needs.rejected and not store.manifest.has_rejected:
        raise DataError(
            f"{flag} {store.prefix}: supervised data, without rejected responses, which --objective {objective} needs. "
            "Train on preference pairs, or use --objective sft."
        )
    if store.manifest.unpaired and not needs.unpaired:
        raise DataError(
            f"{flag} {store.prefix}: unpaired data, one response with a label a row, but --objective {objective} needs "
            f"{'preference pairs' if needs.rejected else 'supervised rows or preference pairs'}. Prepare such data, or use "
            "--objective kto."
        )
    missing = [column for column in needs.columns if column not in store.manifest.pair_columns]
    if missing:
        told = " and ".join(dict.fromkeys(readers(column) for column in missing))
        raise DataError(
            f"{flag} {store.prefix}: no {' and no '.join(missing)} beside its pairs, to be read by {told}. Prepare the data "
            "from rows that have such a column, or train without reading it."
        )


def check_given(pairs: PairCollection, needs: LogpNeeds, objective: str) -> None:
    """Refuse pairs, from the disk or from memory, without the responses or the numbers that an objective reads.

    Args:
        pairs: what a program names.
        needs: of the objective.
        objective: its name.

    Raises:
        DataError: what is missing, of which pair.
    """
    there = pairs.lengths[:, 1:] > 0
    both = np.asarray(there.all(axis=1))
    if needs.unpaired:
        refused = np.flatnonzero(both != both[:1])
        why = "rows of one response and pairs, which would weigh responses unevenly"
        if there.any(axis=0).sum() == 1:
            refused, why = np.arange(1), "responses of one kind alone, and it compares chosen with rejected ones"
    else:
        refused = np.flatnonzero(~(both if needs.rejected else there[:, 0]))
        why = f"rows without a {'chosen and a rejected' if needs.rejected else 'chosen'} response each"
    if refused.size:
        raise DataError(
            f"objective {objective} cannot be trained on {why}: {pairs.describe(int(refused[0]))} has the lengths "
            f"{pairs.lengths[refused[0]].tolist()} (prompt, chosen, rejected). Leave such rows out, or take another objective."
        )
    for store in pairs.stores:
        known = store.manifest.pair_columns if store.manifest else ()
        if missing := [column for column in needs.columns if column not in known]:
            raise DataError(
                f"objective {objective} reads {' and '.join(missing)} beside each pair, and {store.prefix} has none. Prepare the "
                "data from rows that have such a column, or train without reading it."
            )


def check_length(store: PairStore, seq_length: int) -> None:
    """Refuse a data set with a pair that is too long.

    Raises:
        ConfigError: naming the longest prompt with one of its responses, and the value that would work.
    """
    longest = store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)
    most = int(longest.max())
    if most > seq_length:
        raise ConfigError(
            f"--seq-length {seq_length}: pair {int(longest.argmax())} of {store.prefix} is {most} tokens long. "
            f"Use --seq-length {most}, or prepare the data again with --seq-length {seq_length}."
        )
