"""Prepared data to global batches, cut and laid out for one data-parallel rank, ahead of the model in worker processes."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron_rmipo.data.batching import (
    CostModel,
    PairOrder,
    PairSizes,
    conditional_sizes,
    cut_into_packs,
    spread_evenly,
    unconditional_sizes,
)
from megatron_rmipo.data.packing import PackedRow, pack_pairs, pack_responses
from megatron_rmipo.data.pair_store import PairStore, TokenizedPair

# A forward-only pass keeps no activations, so its packs may hold more.
UNCONDITIONAL_PACK_FACTOR = 2


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut and laid out.

    Attributes:
        dp_rank, dp_size: this rank's place in the data-parallel group.
        tokens_per_microbatch: capacity of a conditional pack; unconditional ones hold twice as many.
        cost: what balance is judged by.
        share_prompts: a prompt stands once for both responses.
        with_rejected: the objective reads rejected responses.
        unconditional: ``"bos"``, ``"none"`` or None, as in :class:`megatron_rmipo.objectives.base.LogpNeeds`.
        bos_token_id: the context of unconditional responses for ``"bos"``.
        multiple_of: rows are padded to a multiple of this many tokens.
    """

    dp_rank: int
    dp_size: int
    tokens_per_microbatch: int
    cost: CostModel
    share_prompts: bool = True
    with_rejected: bool = True
    unconditional: str | None = None
    bos_token_id: int | None = None
    multiple_of: int = 1

    @property
    def context_token_id(self) -> int | None:
        """The token before an unconditional response, or None."""
        return self.bos_token_id if self.unconditional == "bos" else None

    def conditional_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) in the gradient pass."""
        return conditional_sizes(lengths, self.cost, share_prompts=self.share_prompts, with_rejected=self.with_rejected)

    def unconditional_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) in the unconditional pass."""
        return unconditional_sizes(
            lengths, self.cost, has_context_token=self.context_token_id is not None, with_rejected=self.with_rejected
        )


@dataclasses.dataclass(frozen=True)
class RankBatch:
    """One global batch as one data-parallel rank sees it.

    Attributes:
        pair_indices: int64 ``[P]``, the global batch's pairs as indices of the data set, the same on every rank.
        conditional: rows of the gradient pass; at least one.
        unconditional: rows of the unconditional pass; empty where the objective has none.
        mean_chosen_length: scored chosen tokens per pair, over the global batch.
        num_tokens: tokens of all ranks' rows, conditional and unconditional, padding left out.
        num_padding: padding tokens of this rank's rows.
        lengths: int32 ``[P, 3]``, prompt, chosen and rejected tokens of the global batch.
    """

    pair_indices: np.ndarray
    conditional: list[PackedRow]
    unconditional: list[PackedRow]
    mean_chosen_length: float
    num_tokens: int
    num_padding: int
    lengths: np.ndarray

    @property
    def num_pairs(self) -> int:
        """P, over all ranks."""
        return len(self.pair_indices)


class PairCollection(Sequence[TokenizedPair]):
    """Pairs of one or more prepared data sets under one numbering.

    Args:
        stores: the data sets.
        members: int64 ``[P]``, which pairs, numbered through the data sets one after the other; None for all.
    """

    def __init__(self, stores: Sequence[PairStore], members: np.ndarray | None = None) -> None:
        self.stores = list(stores)
        self._starts = np.array([0, *itertools.accumulate(len(store) for store in stores)])
        self._members = np.arange(self._starts[-1]) if members is None else members
        self.lengths = np.concatenate([store.lengths for store in self.stores])[self._members]

    @classmethod
    def combine(cls, collections: Sequence[PairCollection], weights: Sequence[float] | None = None) -> PairCollection:
        """Several collections as one.

        Args:
            collections: what to combine, in order.
            weights: shares of the result: the collection that lasts longest is used once, the others are repeated. None takes
                every pair once.
        """
        counts = [len(collection) for collection in collections]
        if weights is not None:
            scale = max(count / weight for count, weight in zip(counts, weights, strict=True))
            counts = [max(1, round(scale * weight)) for weight in weights]
        members, first = [], 0
        for collection, count in zip(collections, counts, strict=True):
            members.append(first + np.resize(collection._members, count))
            first += int(collection._starts[-1])
        return cls([store for collection in collections for store in collection.stores], np.concatenate(members))

    def split(self, held_out_share: float) -> tuple[PairCollection, PairCollection]:
        """(the first pairs, the last ``held_out_share`` of them, at least one), in stored order."""
        first = len(self) - max(1, round(held_out_share * len(self)))
        return PairCollection(self.stores, self._members[:first]), PairCollection(self.stores, self._members[first:])

    def __len__(self) -> int:
        return len(self._members)

    def _locate(self, index: int) -> tuple[PairStore, int]:
        member = self._members[index]
        which = int(np.searchsorted(self._starts, member, side="right")) - 1
        return self.stores[which], int(member - self._starts[which])

    def describe(self, index: int) -> str:
        """Where pair ``index`` can be looked up, for messages."""
        store, number = self._locate(index)
        return f"pair {number} of {store.prefix}"

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        store, number = self._locate(index)
        return store[number]


class BatchBuilder:
    """Pair indices to a :class:`RankBatch`: cut by lengths alone, the same on every rank, then laid out for this one."""

    def __init__(self, pairs: PairCollection, layout: BatchLayout) -> None:
        self.pairs = pairs
        self.layout = layout

    def build(self, pair_indices: np.ndarray, mean_chosen_length: float | None = None) -> RankBatch:
        """Cut and lay out one global batch.

        Args:
            pair_indices: int64 ``[P]``, indices of the data set.
            mean_chosen_length: where the batch is part of a larger whole (an evaluation), that of the whole.
        """
        layout = self.layout
        lengths = self.pairs.lengths[pair_indices]
        sizes = layout.conditional_sizes(lengths)
        costs, num_tokens = sizes.costs, int(sizes.tokens.sum())
        unconditional_sizes = layout.unconditional_sizes(lengths) if layout.unconditional else None
        if unconditional_sizes is not None:
            # Forward only: a third of what forward and backward cost.
            costs = costs + unconditional_sizes.costs / 3
            num_tokens += int(unconditional_sizes.tokens.sum())
        share = spread_evenly(costs, layout.dp_size)[layout.dp_rank]
        conditional = [
            self._conditional_row(pair_indices, pack)
            for pack in cut_into_packs(share, sizes, layout.tokens_per_microbatch) or [[]]
        ]
        unconditional = []
        if unconditional_sizes is not None:
            capacity = UNCONDITIONAL_PACK_FACTOR * layout.tokens_per_microbatch
            packs = cut_into_packs(share, unconditional_sizes, capacity) or [[]]
            unconditional = [self._unconditional_row(pair_indices, pack) for pack in packs]
        return RankBatch(
            pair_indices=pair_indices,
            conditional=conditional,
            unconditional=unconditional,
            mean_chosen_length=float(lengths[:, 1].mean()) if mean_chosen_length is None else mean_chosen_length,
            num_tokens=num_tokens,
            num_padding=sum(row.num_padding for row in conditional + unconditional),
            lengths=lengths,
        )

    def _fetch(self, pair_indices: np.ndarray, pack: list[int]) -> tuple[list[TokenizedPair], list[int]]:
        if not pack:
            # Fewer pairs than ranks: this one runs a pair that does not count, so that collectives still match.
            return [self.pairs[pair_indices[0]]], [-1]
        return [self.pairs[pair_indices[position]] for position in pack], pack

    def _conditional_row(self, pair_indices: np.ndarray, pack: list[int]) -> PackedRow:
        layout = self.layout
        return pack_pairs(
            *self._fetch(pair_indices, pack),
            share_prompts=layout.share_prompts,
            with_rejected=layout.with_rejected,
            multiple_of=layout.multiple_of,
        )

    def _unconditional_row(self, pair_indices: np.ndarray, pack: list[int]) -> PackedRow:
        layout = self.layout
        return pack_responses(
            *self._fetch(pair_indices, pack),
            context_token_id=layout.context_token_id,
            with_rejected=layout.with_rejected,
            multiple_of=layout.multiple_of,
        )


class _Steps(torch.utils.data.Dataset[RankBatch]):
    """Number of a global batch, counted from ``consumed_pairs``, to its RankBatch, for DataLoader's workers."""

    def __init__(self, builder: BatchBuilder, order: PairOrder, batch_size: int, consumed_pairs: int, total_pairs: int) -> None:
        self.builder, self.order, self.batch_size = builder, order, batch_size
        self.consumed_pairs, self.total_pairs = consumed_pairs, total_pairs

    def __len__(self) -> int:
        return max(0, -(-(self.total_pairs - self.consumed_pairs) // self.batch_size))

    def __getitem__(self, step: int) -> RankBatch:
        first = self.consumed_pairs + step * self.batch_size
        return self.builder.build(self.order.batch(first, self.batch_size, self.total_pairs))


def iterate_batches(
    builder: BatchBuilder,
    order: PairOrder,
    *,
    batch_size: int,
    total_pairs: int,
    consumed_pairs: int = 0,
    num_workers: int = 0,
) -> Iterator[RankBatch]:
    """Global batches from ``consumed_pairs`` to the end of the run, for this rank, in order.

    Args:
        builder: cuts and lays out.
        order: which pairs come when.
        batch_size: global batch size, in pairs.
        total_pairs: pairs of the whole run; the last batch may be smaller.
        consumed_pairs: pairs of the run that were seen before.
        num_workers: processes that prepare batches ahead; 0 prepares them when asked for.
    """
    steps = _Steps(builder, order, batch_size, consumed_pairs, total_pairs)
    loader = torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        sampler=range(len(steps)),
        num_workers=num_workers,
        # As bytes: torch would send each tensor as an open file, and run out of them.
        collate_fn=pickle.dumps,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_one_thread,
    )
    return map(pickle.loads, loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
