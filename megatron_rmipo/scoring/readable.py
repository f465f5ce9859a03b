"""Whether a model can score prepared data."""

from __future__ import annotations

from megatron_rmipo.checkpoint.source import ModelSource, check_tokenizer
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import DataError


def check_store(store: PairStore, flag: str, source: ModelSource) -> int:
    """Tokens of the longest row, which the model can take.

    Args:
        store: the data.
        flag: that named it, to stand before its prefix in messages.
        source: the model.

    Raises:
        DataError: it was made with another tokenizer, is supervised, or has a row that is too long.
    """
    check_tokenizer(store, flag, source, load_tokenizer(str(source.assets)).info.fingerprint)
    if not store.manifest.has_rejected:
        raise DataError(f"{flag} {store.prefix}: supervised data, which no objective compares with a reference.")
    if store.longest > source.arch.longest_sequence:
        raise DataError(
            f"{flag} {store.prefix}: pair {store.longest_row()} is {store.longest} tokens long, longer than the model's "
            f"{source.arch.length_limit}. Prepare the data with --seq-length {source.arch.longest_sequence}."
        )
    return store.longest
