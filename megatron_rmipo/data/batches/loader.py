"""Prepared data to global batches, cut and laid out for one data-parallel rank."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from megatron_rmipo.data.batches.packing import pack_pairs, pack_pairs_and_responses, pack_responses
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.data.batches.pipeline_bubble import BACKWARD, PassCosts
from megatron_rmipo.data.batches.sizes import (
    CostModel,
    PairSizes,
    conditional_sizes,
    conditional_tokens,
    unconditional_sizes,
    unconditional_tokens,
)
from megatron_rmipo.data.batches.spread import cheapest_at_both_ends, cut_into_packs, fill_packs, split_packs, spread_evenly
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError

# A forward-only pass keeps no activations, so its packs may hold more.
UNCONDITIONAL_PACK_FACTOR = 2


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut and laid out.

    Attributes:
        dp_rank, dp_size: this rank's place in the data-parallel group.
        tokens_per_microbatch: capacity of a conditional pack; unconditional ones hold twice as many, or no more where it is
            ``multiple_of``, too, so that all rows are equally long. None: every pass has ``num_microbatches`` packs.
        cost: what balance is judged by.
        share_prompts: a prompt stands once for both responses.
        with_rejected: the objective reads rejected responses.
        unconditional: ``"bos"``, ``"none"`` or None, as in :class:`megatron_rmipo.objectives.base.LogpNeeds`.
        forward_passes: forward-only passes over the conditional packs, beside the gradient pass.
        bos_token_id: the context of unconditional responses for ``"bos"``: BOS, or what stands in for it; None for nothing.
        columns: numbers beside the pairs that the objective reads.
        multiple_of: rows are padded to a multiple of this many tokens.
        equal_packs: every data-parallel rank runs the same number of packs, for they meet in the model's layers.
        unconditional_in_rows: the responses alone stand in the rows of the gradient pass instead of in a pass of their own.
        num_microbatches: the gradient pass has just so many packs on each rank, some of them fillers where there are few pairs;
            None: as few as an even spread of cost allows.
        num_stages: pipeline stages that a pack goes through.
        min_packs_per_stage: where there are several stages and pairs enough, each pass has at least so many packs for each.
    """

    dp_rank: int
    dp_size: int
    tokens_per_microbatch: int | None
    cost: CostModel
    share_prompts: bool = True
    with_rejected: bool = True
    unconditional: str | None = None
    forward_passes: int = 0
    bos_token_id: int | None = None
    columns: tuple[str, ...] = ()
    multiple_of: int = 1
    equal_packs: bool = False
    unconditional_in_rows: bool = False
    num_microbatches: int | None = None
    num_stages: int = 1
    min_packs_per_stage: int = 0

    @property
    def least_packs(self) -> int:
        """Packs of each pass on a rank that has pairs for them, where they are not just so many."""
        return max(1, self.min_packs_per_stage * self.num_stages) if self.num_stages > 1 else 1

    @property
    def capacity(self) -> int:
        """Most tokens of a conditional pack."""
        return sys.maxsize if self.tokens_per_microbatch is None else self.tokens_per_microbatch

    @property
    def unconditional_capacity(self) -> int:
        """Most tokens of an unconditional pack: no more than of others where all rows are equally long."""
        return self.capacity if self.multiple_of == self.capacity else UNCONDITIONAL_PACK_FACTOR * self.capacity

    @property
    def num_packs_before(self) -> int | None:
        """Packs of each pass before the gradient pass; None: as few as the capacity allows."""
        return self.num_microbatches if self.tokens_per_microbatch is None else None

    @property
    def has_unconditional_pass(self) -> bool:
        """Whether responses alone are rows of a pass of their own."""
        return self.unconditional is not None and not self.unconditional_in_rows

    @property
    def has_responses_alone(self) -> bool:
        """Whether they stand in the rows of the gradient pass."""
        return self.unconditional is not None and self.unconditional_in_rows

    @property
    def context_token_id(self) -> int | None:
        """The token before an unconditional response, or None."""
        return self.bos_token_id if self.unconditional == "bos" else None

    def gradient_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) in the gradient pass."""
        sizes = self.conditional_sizes(lengths)
        if not self.has_responses_alone:
            return sizes
        alone = self.unconditional_sizes(lengths)
        return PairSizes(sizes.tokens + alone.tokens, sizes.costs + alone.costs, sizes.head_costs + alone.head_costs)

    def conditional_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) with their prompts."""
        return conditional_sizes(lengths, self.cost, share_prompts=self.share_prompts, with_rejected=self.with_rejected)

    def unconditional_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) without their prompts."""
        return unconditional_sizes(
            lengths, self.cost, has_context_token=self.context_token_id is not None, with_rejected=self.with_rejected
        )

    def gradient_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of pairs (int ``[P, 3]`` lengths) in the gradient pass, int64 ``[P]``: those of :meth:`gradient_sizes` alone."""
        tokens = self.conditional_tokens(lengths)
        if not self.has_responses_alone:
            return tokens
        has_context_token = self.context_token_id is not None
        tokens += unconditional_tokens(lengths, has_context_token=has_context_token, with_rejected=self.with_rejected)
        return tokens

    def conditional_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of pairs (int ``[P, 3]`` lengths) with their prompts, int64 ``[P]``."""
        return conditional_tokens(lengths, share_prompts=self.share_prompts, with_rejected=self.with_rejected)

    def step_costs(self, gradient: PairSizes, *forward_only: PairSizes) -> np.ndarray:
        """What each pair costs in a step, float64 ``[P]``, from its sizes in the gradient pass and in those beside it."""
        costs = gradient.costs * (1.0 + BACKWARD + self.forward_passes)
        return np.asarray(sum((sizes.costs for sizes in forward_only), start=costs))


@dataclasses.dataclass(frozen=True)
class RankBatch:
    """One global batch as one data-parallel rank sees it.

    Attributes:
        pair_indices: int64 ``[P]``, the global batch's pairs as indices of the data set, the same on every rank.
        conditional: rows of the gradient pass; at least one.
        unconditional: rows of the unconditional pass; empty where the objective has none.
        mismatched: rows of the mismatched pass; empty where the objective has none.
        reference_scores, mismatched_reference_scores: fp32 ``[P, 2]`` sums under the reference of (chosen, rejected) of the
            global batch's pairs, the same on every rank; None where not needed.
        columns: column -> fp32 ``[P]``, numbers beside the global batch's pairs, the same on every rank.
        mean_chosen_length: scored chosen tokens per pair, over the global batch; 1 where no row has a chosen response.
        num_tokens: tokens of all ranks' rows, each row counted once, padding left out.
        gradient_tokens: int64 ``[P]``, tokens of each pair in the gradient pass, responses alone left out.
        num_padding: padding tokens of this rank's rows.
        cost: of all ranks' passes, forward and backward, by the layout's cost model.
        passes: what this rank's packs cost, pass by pass as they run; where all ranks run theirs at one time, the costliest's.
        lengths: int32 ``[P, 3]``, prompt, chosen and rejected tokens of the global batch.
    """

    pair_indices: np.ndarray
    conditional: list[Row]
    unconditional: list[Row]
    mismatched: list[Row]
    reference_scores: np.ndarray | None
    mismatched_reference_scores: np.ndarray | None
    columns: dict[str, np.ndarray]
    mean_chosen_length: float
    num_tokens: int
    gradient_tokens: np.ndarray
    num_padding: int
    cost: float
    passes: list[PassCosts]
    lengths: np.ndarray

    @property
    def rows(self) -> list[Row]:
        """All rows of this rank."""
        return self.conditional + self.unconditional + self.mismatched

    @property
    def num_gradient_tokens(self) -> int:
        """Tokens of all ranks' rows of the gradient pass, padding and responses alone left out."""
        return int(self.gradient_tokens.sum())

    @property
    def num_pairs(self) -> int:
        """P, over all ranks."""
        return len(self.pair_indices)


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
        layout, mismatched = self.layout, self.pairs.mismatched
        lengths = self.pairs.lengths_of(pair_indices)
        passes = self._passes(pair_indices, lengths)
        costs = layout.step_costs(*(one.sizes for one in passes))
        cuts = self._cut(passes, costs, [layout.dp_rank])
        rows = [self._lay_out(one, packs[layout.dp_rank], pair_indices) for one, packs in zip(passes, cuts, strict=True)]
        return RankBatch(
            pair_indices=pair_indices,
            conditional=rows[0],
            unconditional=rows[1] if layout.has_unconditional_pass else [],
            mismatched=rows[-1] if mismatched is not None else [],
            reference_scores=self.pairs.scores_of(pair_indices),
            mismatched_reference_scores=mismatched.scores_of(pair_indices) if mismatched is not None else None,
            columns=self.pairs.values_of(pair_indices, layout.columns),
            mean_chosen_length=mean_chosen_length or float(lengths[:, 1].mean()) or 1.0,
            num_tokens=sum(int(one.sizes.tokens.sum()) for one in passes),
            gradient_tokens=layout.conditional_sizes(lengths).tokens,
            cost=float(costs.sum()),
            passes=self._pass_costs(passes, cuts, layout.dp_rank),
            num_padding=sum(row.num_padding for part in rows for row in part),
            lengths=lengths,
        )

    def pass_costs(self, pair_indices: np.ndarray, ranks: Sequence[int]) -> tuple[float, list[list[PassCosts]]]:
        """What a global batch costs, of which no token is read: all of it, and as :attr:`RankBatch.passes` of some ranks."""
        passes = self._passes(pair_indices, self.pairs.lengths_of(pair_indices))
        costs = self.layout.step_costs(*(one.sizes for one in passes))
        cuts = self._cut(passes, costs, ranks)
        return float(costs.sum()), [self._pass_costs(passes, cuts, rank) for rank in ranks]

    def _passes(self, pair_indices: np.ndarray, lengths: np.ndarray) -> list[Pass]:
        """The gradient pass, then those beside it: responses alone, then mismatched pairs, whichever there are."""
        layout, mismatched = self.layout, self.pairs.mismatched
        capacity, before = layout.capacity, layout.num_packs_before
        gradient_row = self._row_with_responses_alone() if layout.has_responses_alone else self._conditional_row()
        passes = [Pass(self.pairs, lengths, layout.gradient_sizes(lengths), capacity, gradient_row, layout.num_microbatches)]
        if layout.has_unconditional_pass:
            sizes, most = layout.unconditional_sizes(lengths), layout.unconditional_capacity
            passes.append(Pass(self.pairs, lengths, sizes, most, self._unconditional_row(), before))
        if mismatched is not None:
            others = mismatched.lengths_of(pair_indices)
            sizes = layout.conditional_sizes(others)
            passes.append(Pass(mismatched, others, sizes, capacity, self._conditional_row(), before))
        return passes

    def _lay_out(self, one: Pass, packs: list[list[int]], pair_indices: np.ndarray) -> list[Row]:
        rows = []
        for pack in packs:
            pairs = [one.pairs[int(pair_indices[position])] for position in one.positions(pack)]
            rows.append(one.lay_out(pairs, pack or [-1]))
        return rows

    def _pass_costs(self, passes: Sequence[Pass], cuts: Sequence[dict[int, list[list[int]]]], rank: int) -> list[PassCosts]:
        """What a rank's packs cost, in the order in which passes run."""
        found = []
        for number, (one, packs) in enumerate(zip(passes, cuts, strict=True)):
            together = list(packs.values()) if self.layout.equal_packs else [packs[rank]]
            layers, head = (
                np.array([[values[one.positions(pack)].sum() for pack in own] for own in together]).max(axis=0)
                for values in (one.sizes.costs - one.sizes.head_costs, one.sizes.head_costs)
            )
            found.append(PassCosts(layers, head, backward=number == 0))
        gradient, *beside = found
        forward_only = [dataclasses.replace(gradient, backward=False)] * self.layout.forward_passes
        return [*beside, *forward_only, gradient]

    def _cut(self, passes: Sequence[Pass], costs: np.ndarray, ranks: Sequence[int]) -> list[dict[int, list[list[int]]]]:
        """Of each pass some ranks' packs, as positions in the global batch; -1 or an empty one stands for a filler.

        Where ranks meet in layers, those of all ranks: each has to know how many packs the others run.
        """
        shares = spread_evenly(costs, self.layout.dp_size)
        looked_at = range(len(shares)) if self.layout.equal_packs else ranks
        return [self._packs(one, shares, looked_at) for one in passes]

    def _packs(self, one: Pass, shares: list[list[int]], ranks: Sequence[int]) -> dict[int, list[list[int]]]:
        """Some ranks' packs of a pass, at least one each; an empty one stands for a filler."""
        if one.num_packs is not None:
            return self._filled_packs(one, shares, ranks)
        cuts = {rank: cut_into_packs(shares[rank], one.sizes, one.max_tokens, self.layout.least_packs) for rank in ranks}
        most = max(1, *map(len, cuts.values())) if self.layout.equal_packs else 1
        packs = {rank: split_packs(cut, one.sizes, most) for rank, cut in cuts.items()}
        packs = {rank: split + [[] for _ in range(most - len(split))] for rank, split in packs.items()}
        if self.layout.num_stages == 1:
            return packs
        return {rank: cheapest_at_both_ends(filled, one.sizes) for rank, filled in packs.items()}

    def _filled_packs(self, one: Pass, shares: list[list[int]], ranks: Sequence[int]) -> dict[int, list[list[int]]]:
        assert one.num_packs is not None
        # Where a share may not fit, every rank looks at all of them, so that none waits for one that refuses.
        looked_at = range(len(shares)) if one.max_tokens < int(one.sizes.tokens.sum()) else ranks
        packs = {}
        for rank in looked_at:
            found = fill_packs(shares[rank], one.sizes, one.max_tokens, one.num_packs)
            if found is None:
                raise ConfigError(
                    f"{one.num_packs} micro-batches of at most {one.max_tokens} tokens do not hold the {len(shares[rank])} pairs "
                    f"of a step on data-parallel rank {rank}, {int(one.sizes.tokens[shares[rank]].sum())} tokens in all. Give it "
                    "more micro-batches or ranks, more tokens for each, or fewer pairs a step."
                )
            packs[rank] = found
        return packs

    def _conditional_row(self) -> Callable[..., Row]:
        layout = self.layout
        return partial(
            pack_pairs,
            share_prompts=layout.share_prompts,
            with_rejected=layout.with_rejected,
            multiple_of=layout.multiple_of,
        )

    def _row_with_responses_alone(self) -> Callable[..., Row]:
        layout = self.layout
        return partial(
            pack_pairs_and_responses,
            context_token_id=layout.context_token_id,
            share_prompts=layout.share_prompts,
            with_rejected=layout.with_rejected,
            multiple_of=layout.multiple_of,
        )

    def _unconditional_row(self) -> Callable[..., Row]:
        layout = self.layout
        return partial(
            pack_responses,
            context_token_id=layout.context_token_id,
            with_rejected=layout.with_rejected,
            multiple_of=layout.multiple_of,
        )


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a step over the global batch.

    Attributes:
        pairs: the data it reads.
        lengths: int32 ``[P, 3]``, of the global batch's pairs in it.
        sizes: of these in its packs.
        max_tokens: capacity of a pack.
        lay_out: (pairs, their numbers in the global batch) to a row.
        num_packs: how many there are; None: as few as an even spread of cost allows.
    """

    pairs: PairCollection
    lengths: np.ndarray
    sizes: PairSizes
    max_tokens: int
    lay_out: Callable[[list[TokenizedPair], list[int]], Row]
    num_packs: int | None = None

    def positions(self, pack: Sequence[int]) -> list[int]:
        """Those of the pairs that a pack runs; a filler is one that does not count, so that collectives still match."""
        filler = int(self.sizes.tokens.argmin())
        return [filler if position < 0 else position for position in pack or [-1]]
