"""The responses of a data set without their prompts, as their scores are kept: log p(y)."""

from __future__ import annotations

from megatron_rmipo.data.store.pair_store import PairStore


class ResponsesAlone:
    """A data set whose responses are scored after a context token, or after nothing, their first token unscored.

    Args:
        store: the data set.
        context_token_id: the token; None for nothing.

    Attributes:
        store, context_token_id: as given.
        prefix, manifest: those of the data set.
    """

    def __init__(self, store: PairStore, context_token_id: int | None) -> None:
        self.store, self.context_token_id = store, context_token_id
        self.prefix, self.manifest = store.prefix, store.manifest

    def __len__(self) -> int:
        return len(self.store)

    @property
    def kind(self) -> str:
        """How its scores are told from others of the data set."""
        return "alone" if self.context_token_id is None else f"alone-after-{self.context_token_id}"
