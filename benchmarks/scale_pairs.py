"""The stages of a run that grow with the number of prepared pairs."""

from __future__ import annotations

from functools import partial

from benchmarks.scale_world import Measured, cost
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.fingerprint import collection_fingerprint, content_facts
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.flops import forward_cost_model

DP_SIZE = 32


def measure_pairs(prefix: str, arch: ModelArchitecture, batch_size: int) -> dict[str, Measured]:
    """Every stage by name; batches are those of one data-parallel rank of 32."""
    measured = {"data opened, a hundredth held out": cost(partial(_open, prefix))}
    pairs, held_out = _open(prefix)
    layout = BatchLayout(0, DP_SIZE, 16384, forward_cost_model(arch), unconditional="bos", bos_token_id=128000)
    order, builder = PairOrder(len(pairs), 1), BatchBuilder(pairs, layout)
    middle = len(pairs) // 2
    indices = order.batch(middle, batch_size, len(pairs))
    measured["data identified: one rank of a host"] = cost(partial(_identify, pairs, held_out))
    measured["the largest pair found"] = cost(partial(check_pairs_fit, pairs, layout))
    measured["order of a batch"] = cost(lambda: order.batch(middle, batch_size, len(pairs)))
    measured["a batch read, cut and laid out"] = cost(lambda: builder.build(indices))
    return measured


def _open(prefix: str) -> tuple[PairCollection, PairCollection]:
    return PairCollection([PairStore(prefix)]).split(0.01)


def _identify(pairs: PairCollection, held_out: PairCollection) -> None:
    content_facts(pairs.stores[0])
    collection_fingerprint(pairs)
    collection_fingerprint(held_out)
