"""What data are, by content and without reading all of it: their lengths, and a sample of their tokens.

Other data of as many rows have other lengths; a sample tells those apart whose lengths are the same, as after an edit in place.
:func:`megatron_rmipo.data.store.reference_scores.data_fingerprint` reads all, where numbers are kept for good.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.file_digests import sample_digest
from megatron_rmipo.data.store.manifest import store_paths
from megatron_rmipo.data.store.pair_store import PairStore

# A MiB in all; smaller data are read whole.
_SAMPLES = 256


def content_facts(store: PairStore) -> dict[str, Any]:
    """What a data set holds, by name, wherever it lies: plain values, digests in hex."""
    manifest = store.manifest
    # Named where they are there alone: what has none keeps the digest it had.
    beside = {"numbers beside the pairs": store.values_digest} if manifest.pair_columns else {}
    columns = {"columns": manifest.pair_columns} if manifest.pair_columns else {}
    return {
        **columns,
        **beside,
        "number of pairs": len(store),
        "kind of rows": manifest.kind,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "lengths": store.lengths_digest,
        "tokens": sample_digest(store_paths(store.prefix)["bin"], _SAMPLES),
    }


def collection_fingerprint(pairs: PairCollection) -> str:
    """Hex digest over the contents of the data sets and over which pairs of them are taken, in their order."""
    digest = hashlib.sha256(json.dumps([content_facts(store) for store in pairs.stores], sort_keys=True).encode())
    for _, members in pairs.all_members():
        digest.update(members.data)
    return digest.hexdigest()
