"""What the packs of a step cost under a layout, in floating point operations, from the lengths of pairs alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.pipeline_bubble import PassCosts, Stages
from megatron_rmipo.data.batches.spread import spread_evenly
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.passes.layout import batch_layout
from megatron_rmipo.planning.lengths import PairLengths

# The token before responses alone: any will do, for none is read.
_CONTEXT_TOKEN = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step as the costliest data-parallel rank has it.

    Attributes:
        passes: FLOPs of its packs, pass by pass as they run.
        tokens: of each pass, in all its packs.
        flops: of all ranks together, forward and backward.
        num_pairs: of the global batch.
        num_tokens: of all ranks' rows of the gradient pass.
    """

    passes: tuple[PassCosts, ...]
    tokens: tuple[float, ...]
    flops: float
    num_pairs: int
    num_tokens: float

    @property
    def num_packs(self) -> int:
        """Packs of the gradient pass."""
        return len(self.passes[-1].layers)


class Workloads:
    """The workloads of one model, objective and data under all layouts; those that are cut alike are found once.

    Args:
        arch: the model.
        needs: of the objective.
        lengths: of the pairs.
    """

    def __init__(self, arch: ModelArchitecture, needs: LogpNeeds, lengths: PairLengths) -> None:
        self.arch, self.needs = arch, needs
        self.pairs = lengths.with_mismatched() if needs.mismatched else lengths
        self._found: dict[BatchLayout, Workload] = {}
        self._shares: dict[tuple[int, bytes], list[list[int]]] = {}

    def layout(self, config: Config, dp_size: int) -> BatchLayout:
        """How batches are laid out with some flags."""
        return batch_layout(config, self.arch, self.needs, context_token_id=_CONTEXT_TOKEN, dp_rank=0, dp_size=dp_size)

    def largest_pair(self, config: Config) -> int:
        """Tokens that a pack has to hold."""
        layout = self.layout(config, 1)
        most = int(layout.gradient_tokens(self.pairs.lengths).max())
        others = self.pairs.mismatched
        return most if others is None else max(most, int(layout.conditional_tokens(others.lengths).max()))

    def scored_share(self, config: Config) -> float:
        """Of the tokens of a gradient pass's packs, those that are scored; of all pairs together."""
        layout = self.layout(config, 1)
        lengths = self.pairs.lengths
        scored = lengths[:, 1:].sum() if layout.with_rejected else lengths[:, 1].sum()
        return float(scored / max(1, layout.gradient_tokens(lengths).sum()))

    def head_share(self, config: Config) -> float:
        """Work of the output layer over that of all layers, in the gradient pass of all pairs."""
        sizes = self.layout(config, 1).gradient_sizes(self.pairs.lengths)
        head = float((sizes.head_costs + sizes.head_backward_costs).sum())
        return head / max(1.0, float((sizes.costs + sizes.backward_costs).sum()) - head)

    def of(self, config: Config, dp_size: int) -> Workload:
        """The first global batch under some flags."""
        layout = self.layout(config, dp_size)
        # How many layers each stage holds changes no pack.
        layout = dataclasses.replace(layout, stages=Stages.even(layout.num_stages, layout.stages.num_chunks))
        if layout not in self._found:
            self._found[layout] = self._cut(layout, config.training.global_batch_size)
        return self._found[layout]

    def _cut(self, layout: BatchLayout, batch_size: int) -> Workload:
        indices = self.pairs.batch(batch_size)
        pairs: Any = self.pairs  # In the place of a collection, of which no pair is read here.
        _, (passes,) = BatchBuilder(pairs, layout, self._spread).pass_costs(indices, [0])
        lengths = self.pairs.lengths_of(indices)
        gradient = layout.gradient_sizes(lengths)
        beside = [layout.unconditional_sizes(lengths)] if layout.has_unconditional_pass else []
        if self.pairs.mismatched is not None:
            beside.append(layout.conditional_sizes(self.pairs.mismatched.lengths_of(indices)))
        sizes = [*beside, *[gradient] * (layout.forward_passes + 1)]
        return Workload(
            tuple(passes),
            tuple(float(one.tokens.sum()) / layout.dp_size for one in sizes),
            flops=float(layout.step_costs(gradient, *beside).sum()),
            num_pairs=len(indices),
            num_tokens=float(gradient.tokens.sum()),
        )

    def _spread(self, costs: np.ndarray, num_shares: int) -> list[list[int]]:
        """Over as many data-parallel ranks the same, whatever else a layout is."""
        key = (num_shares, costs.tobytes())
        if key not in self._shares:
            self._shares[key] = spread_evenly(costs, num_shares)
        return self._shares[key]


def equal_sequences(arch: ModelArchitecture, length: int, packs: int, sequences: int = 1, *, replicas: int = 1) -> Workload:
    """Pre-training on sequences of one length, which figures of other programs are for.

    Args:
        arch: the model.
        length: tokens of a sequence, all of them scored.
        packs: of a rank and step.
        sequences: of each pack.
        replicas: data-parallel ranks.
    """
    cost = forward_cost_model(arch)
    area = sum(per_area * _seen(length, window) for window, per_area in cost.per_windowed_area)
    attention = cost.per_area * _seen(length, None) + area
    layers, head, backward = cost.per_token * length, cost.per_scored_token * length, cost.backward
    costs = (
        *(layers + attention, head),
        *(backward.tokens * layers + backward.area * attention, backward.scored_tokens * head),
    )
    one = PassCosts(*(np.full(packs, sequences * each) for each in costs))
    tokens = float(packs * sequences * length)
    return Workload((one,), (tokens,), one.work * replicas, packs * sequences * replicas, tokens * replicas)


def _seen(length: int, window: int | None) -> float:
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) / 2 + (length - growing) * growing
