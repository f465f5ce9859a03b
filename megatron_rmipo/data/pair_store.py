"""The store by the import path under which it was first documented."""

from megatron_rmipo.data.store.pair_store import PairStore, PairStoreWriter, TokenizedPair

__all__ = ["PairStore", "PairStoreWriter", "TokenizedPair"]
