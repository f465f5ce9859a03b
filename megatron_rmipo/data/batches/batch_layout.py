"""How a global batch is cut and laid out, and what pairs cost then."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from megatron_rmipo.data.batches.pipeline_bubble import Stages, fastest_packs
from megatron_rmipo.data.batches.sizes import (
    CostModel,
    PairSizes,
    conditional_sizes,
    conditional_tokens,
    unconditional_sizes,
    unconditional_tokens,
)

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
        stages: pipeline stages that a pack goes through, and how layers are split over them.
        min_packs_per_stage: where there are several stages and pairs enough, each pass has at least so many packs for each; None:
            as many as :func:`megatron_rmipo.data.batches.pipeline_bubble.fastest_packs` says.
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
    stages: Stages = Stages()  # noqa: RUF009
    min_packs_per_stage: int | None = None

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.stages.num_stages

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

    def least_packs(self, num_tokens: int) -> int:
        """Packs at least of a pass with so many tokens on a rank, where there are pairs for them."""
        if self.num_stages == 1:
            return 1
        if self.min_packs_per_stage is None:
            return fastest_packs(num_tokens, self.stages)
        return max(1, self.min_packs_per_stage * self.num_stages)

    def gradient_sizes(self, lengths: np.ndarray) -> PairSizes:
        """Sizes of pairs (int ``[P, 3]`` lengths) in the gradient pass."""
        sizes = self.conditional_sizes(lengths)
        if not self.has_responses_alone:
            return sizes
        return sizes + self.unconditional_sizes(lengths)

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
        costs = gradient.costs * (1.0 + self.forward_passes) + gradient.backward_costs
        return np.asarray(sum((sizes.costs for sizes in forward_only), start=costs))
