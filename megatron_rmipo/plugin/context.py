"""Which token stands before a response in log p(y), where a caller leaves it to the data."""

from __future__ import annotations

from typing import Literal, TypeAlias

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError

# An id, None for nothing (the first token of a response is not scored then), or the BOS of the tokenizer that made the data.
ContextTokenId: TypeAlias = int | Literal["bos"] | None


def context_token(given: ContextTokenId, pairs: PairCollection) -> int | None:
    """The id of the token before a response in log p(y), or None for nothing.

    Args:
        given: as the caller was told.
        pairs: the data.

    Raises:
        ConfigError: the data does not say of a BOS, or its tokenizer has none.
    """
    if given != "bos":
        return given
    manifests = [store.manifest for store in pairs.stores]
    found = {manifest.tokenizer.bos_token_id if manifest else None for manifest in manifests}
    if len(found) == 1 and (token := found.pop()) is not None:
        return int(token)
    firsts = {manifest.first_token_id for manifest in manifests if manifest} - {None}
    hint = f" (every prompt begins with token {firsts.pop()})" if len(firsts) == 1 else ""
    raise ConfigError(
        "context_token_id: log p(y) takes a token before each response, BOS, and the data has none or does not say it. Give the "
        f"id of the one that a conversation begins with{hint}, or None to leave the first token of each response unscored."
    )
