"""Global batches as padded rows, for one data-parallel rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from megatron_rmipo.data.batches.batch_builder import BatchBuilder, Pass
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.padding import (
    PaddedShape,
    Row,
    cut_by_length,
    pad_pairs,
    pad_pairs_and_responses,
    pad_responses,
    row_lengths,
)
from megatron_rmipo.data.store.collection import PairCollection


class PaddedBatchBuilder(BatchBuilder):
    """Pair indices to a :class:`megatron_rmipo.data.batches.batch_builder.RankBatch` of padded rows.

    Every pass has the same pairs in its micro-batches, as many in each, within one.

    Args:
        pairs: the data.
        layout: of it ``num_microbatches`` is given, ``share_prompts`` is False, and no capacity is heeded.
        shape: of the rows.

    Raises:
        ConfigError: a pair is longer than ``pad_to``, or that is no multiple.
    """

    def __init__(self, pairs: PairCollection, layout: BatchLayout, shape: PaddedShape) -> None:
        super().__init__(pairs, dataclasses.replace(layout, share_prompts=False))
        self.shape = dataclasses.replace(shape, with_rejected=layout.with_rejected)
        self.shape.check(pairs.all_lengths(), pairs.describe)

    def _cut(self, passes: Sequence[Pass], costs: np.ndarray, ranks: Sequence[int]) -> list[dict[int, list[list[int]]]]:
        assert self.layout.num_microbatches is not None
        # The longest of a pair over all passes, so that neither has a long row among short ones.
        longest = np.max([row_lengths(one.lengths, with_rejected=self.shape.with_rejected) for one in passes], axis=0)
        cut = cut_by_length(longest, self.layout.dp_size, self.layout.num_microbatches)
        num_pairs = self.shape.num_pairs or 0
        packs = {rank: [pack + [-1] * (num_pairs - len(pack)) for pack in cut[rank]] for rank in ranks}
        return [packs for _ in passes]

    def _conditional_row(self) -> Callable[..., Row]:
        return partial(pad_pairs, shape=self.shape)

    def _row_with_responses_alone(self) -> Callable[..., Row]:
        return partial(pad_pairs_and_responses, shape=self.shape, context_token_id=self.layout.context_token_id)

    def _unconditional_row(self) -> Callable[..., Row]:
        return partial(pad_responses, shape=self.shape, context_token_id=self.layout.context_token_id)
