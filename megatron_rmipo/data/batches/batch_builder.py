"""A global batch, cut into packs and laid out for one data-parallel rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.packing import pack_pairs, pack_pairs_and_responses, pack_responses
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.data.batches.pipeline_bubble import PassCosts
from megatron_rmipo.data.batches.sizes import PairSizes
from megatron_rmipo.data.batches.spread import cheapest_at_both_ends, cut_into_packs, fill_packs, split_packs, spread_evenly
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError

# Costs of pairs and a number of shares -> the pairs of each share: :func:`megatron_rmipo.data.batches.spread.spread_evenly`.
Spread = Callable[[np.ndarray, int], list[list[int]]]


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
    """Pair indices to a :class:`RankBatch`: cut by lengths alone, the same on every rank, then laid out for this one.

    Args:
        pairs: the data set.
        layout: how batches are cut and laid out.
        spread: shares pairs out to data-parallel ranks; who builds many layouts hands over one that remembers its answers.
    """

    def __init__(self, pairs: PairCollection, layout: BatchLayout, spread: Spread = spread_evenly) -> None:
        self.pairs = pairs
        self.layout = layout
        self._spread = spread

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
            sizes = one.sizes
            layers, head, layers_back, head_back = (
                np.array([[values[one.positions(pack)].sum() for pack in own] for own in together]).max(axis=0)
                for values in (
                    *(sizes.costs - sizes.head_costs, sizes.head_costs),
                    *(sizes.backward_costs - sizes.head_backward_costs, sizes.head_backward_costs),
                )
            )
            has_backward = number == 0
            found.append(PassCosts(layers, head, layers_back * has_backward, head_back * has_backward))
        gradient, *beside = found
        forward_only = [gradient.forward_only] * self.layout.forward_passes
        return [*beside, *forward_only, gradient]

    def _cut(self, passes: Sequence[Pass], costs: np.ndarray, ranks: Sequence[int]) -> list[dict[int, list[list[int]]]]:
        """Of each pass some ranks' packs, as positions in the global batch; -1 or an empty one stands for a filler.

        Where ranks meet in layers, those of all ranks: each has to know how many packs the others run.
        """
        shares = self._spread(costs, self.layout.dp_size)
        looked_at = range(len(shares)) if self.layout.equal_packs else ranks
        return [self._packs(one, shares, looked_at) for one in passes]

    def _packs(self, one: Pass, shares: list[list[int]], ranks: Sequence[int]) -> dict[int, list[list[int]]]:
        """Some ranks' packs of a pass, at least one each; an empty one stands for a filler."""
        if one.num_packs is not None:
            return self._filled_packs(one, shares, ranks)
        cuts = {}
        for rank in ranks:
            least = self.layout.least_packs(int(one.sizes.tokens[shares[rank]].sum()))
            cuts[rank] = cut_into_packs(shares[rank], one.sizes, one.max_tokens, least)
        most = max(1, *map(len, cuts.values())) if self.layout.equal_packs else 1
        multiple = self.layout.stages.packs_multiple
        packs = {}
        for rank, cut in cuts.items():
            number = -(-max(most, len(cut)) // multiple) * multiple
            split = split_packs(cut, one.sizes, number)
            packs[rank] = split + [[] for _ in range(number - len(split))]
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
