"""What a run says of its pipeline before the first step: how long stages will stand still, and which flags would change that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from megatron_rmipo.config.pipeline_split import best_split, present_split
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.pipeline_bubble import Stages, even_length, idle_share, simulated_length
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.training.course.run import Run

MOST_IDLE = 0.25
# Data-parallel ranks that are looked at; the spread makes them alike.
MOST_RANKS = 2
# A remedy leaves at most this of what stages stand still now.
WORTH_SAYING = 0.9
# A split is worth a word that leaves the slowest stage at most this of its work.
MOST_OF_THE_SLOWEST = 0.96
# Beyond so many micro-batches a stage little is left to gain.
MOST_PER_STAGE = 8


@dataclasses.dataclass(frozen=True)
class PipelineEstimate:
    """What a global batch of a run will be like.

    Attributes:
        idle: share of a step that stages stand still, by what packs cost.
        even: the same, if all packs and stages cost the same.
        num_packs: micro-batches of the gradient pass, the fewest of a rank.
        cost_per_pair: of the time that a step takes on all ranks, with what packs cost beside their tokens.
        imbalance: work of the last stage over the mean stage's.
        head_share: work of the output layer over that of all layers.
    """

    idle: float
    even: float
    num_packs: int
    cost_per_pair: float
    imbalance: float
    head_share: float


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """The global batches that a run will see.

    Attributes:
        pairs: the data.
        order: of the pairs.
        consumed_pairs, total_pairs: where the run stands, and where it ends.
    """

    pairs: PairCollection
    order: PairOrder
    consumed_pairs: int
    total_pairs: int

    def estimate(self, layout: BatchLayout, batch_size: int) -> PipelineEstimate:
        """What the next one will be like under a layout, from its lengths alone."""
        ranks = sorted({int(rank) for rank in np.linspace(0, layout.dp_size - 1, MOST_RANKS)})
        indices = self.order.batch(self.consumed_pairs, batch_size, self.total_pairs)
        cost, passes_of = BatchBuilder(self.pairs, layout).pass_costs(indices, ranks)
        stages, size, replicas = layout.stages, layout.num_stages, layout.dp_size
        with_overhead = [[one.with_overhead(layout.cost.per_token) for one in passes] for passes in passes_of]
        by_cost, if_even, in_all = (
            max(length(passes, stages) for passes in those)
            for length, those in ((simulated_length, passes_of), (even_length, passes_of), (simulated_length, with_overhead))
        )
        works = np.sum([one.stage_work(stages) for passes in passes_of for one in passes], axis=0)
        head = sum(one.head_work for passes in passes_of for one in passes)
        return PipelineEstimate(
            idle=idle_share(cost, by_cost, size, replicas),
            even=idle_share(cost, if_even, size, replicas),
            num_packs=min(len(passes[-1].layers) for passes in passes_of),
            cost_per_pair=in_all * size * replicas / len(indices),
            imbalance=float(works[-1] / works.mean()),
            head_share=head / (float(works.sum()) - head),
        )


def tell_pipeline(run: Run) -> None:
    """Say how long stages will stand still, and warn where it is long, with the flags that would help. The first rank looks."""
    if run.groups.pp_size == 1 or run.groups.rank != 0 or run.progress.consumed_pairs >= run.total_pairs:
        return
    layout, batch_size = run.pairs.layout, run.config.training.global_batch_size
    batches = RunBatches(run.pairs.pairs, run.order, run.progress.consumed_pairs, run.total_pairs)
    found = batches.estimate(layout, batch_size)
    run.reporter.say(
        f"pipeline: about {found.idle:.0%} of a step idle ({found.even:.0%} if packs and stages were even), "
        f"{found.num_packs} micro-batches a rank"
    )
    if better := _better_split(run.config, run.state.policy.architecture.num_layers, found.head_share):
        run.reporter.say(f"pipeline: {better}")
    if found.idle > MOST_IDLE:
        run.reporter.warn(f"pipeline stages stand still for about {found.idle:.0%} of a step; {_advice(run, batches, found)}")


def _better_split(config: Config, num_layers: int, head_share: float) -> str:
    """Which flags would even out what the stages have to do, where the slowest has much more than it need have; else empty.

    Args:
        config: of the run.
        num_layers: of the model.
        head_share: work of the output layer over that of all layers.
    """
    head = head_share * num_layers
    best = None if config.model.bridge else best_split(num_layers, head, config.parallel)
    slowest = max(present_split(num_layers, head, config.parallel).stage_costs)
    if best is None or max(best.stage_costs) > MOST_OF_THE_SLOWEST * slowest:
        return ""
    return (
        f"the slowest stage does the work of {slowest:.1f} layers, the output layer being worth {head:.1f}; with "
        f"{best.flags or 'an even split'} it would be {max(best.stage_costs):.1f}"
    )


def _advice(run: Run, batches: RunBatches, found: PipelineEstimate) -> str:
    """Which flags would help, each alone, without making a pair dearer; and what is in the way."""
    layout = run.pairs.layout
    helpful = []
    for remedies in _remedies(run, found):
        best = ("", found)
        for text, other, size in remedies:
            would_be = batches.estimate(other, size)
            if would_be.cost_per_pair <= found.cost_per_pair:
                best = min(best, (text, would_be), key=lambda one: one[1].idle)
            if best[1].idle <= MOST_IDLE:
                break
        if best[1].idle <= max(MOST_IDLE, WORTH_SAYING * found.idle):
            helpful.append(f"{best[0]} ({best[1].idle:.0%})")
    if helpful:
        text = f"flags that would change it, each alone (what would be left): {'; '.join(helpful)}"
    else:
        text = "no flag alone would change it without a pair taking longer"
    a_rank = run.config.training.global_batch_size // layout.dp_size
    if found.num_packs >= a_rank:
        text += f". A rank has about {a_rank} pairs of a step, each in a micro-batch of its own already"
    if found.imbalance > 1.1:
        text += f". The last stage, with the output layer, has {found.imbalance:.2f} times a stage's mean work"
    return text


def _remedies(run: Run, found: PipelineEstimate) -> Iterator[list[tuple[str, BatchLayout, int]]]:
    """Of each flag the values that may help, the mildest first: (what to write, the layout then, pairs of a step then)."""
    layout, config = run.pairs.layout, run.config
    size, stages = config.training.global_batch_size, layout.num_stages
    most = min(MOST_PER_STAGE, -(-size // (layout.dp_size * stages)))
    yield [
        (f"--min-microbatches-per-stage {least}", dataclasses.replace(layout, min_packs_per_stage=least), size)
        for least in (1, 2, 3, 4, 6, MOST_PER_STAGE)
        if found.num_packs < least * stages <= most * stages
    ]
    tokens = layout.capacity // 2
    # Twice the length holds every pair, whatever the data.
    if tokens >= 2 * config.data.seq_length:
        yield [(f"--tokens-per-microbatch {tokens}", dataclasses.replace(layout, tokens_per_microbatch=tokens), size)]
    # Where so many packs were asked for, packs as they are, and more of them.
    asked = layout.min_packs_per_stage
    yield [
        (
            f"--global-batch-size {size * factor}" + (f" with --min-microbatches-per-stage {asked * factor}" if asked else ""),
            dataclasses.replace(layout, min_packs_per_stage=asked * factor if asked else asked),
            size * factor,
        )
        for factor in (2, 4)
        if size * factor <= len(run.pairs.pairs)
    ]
    fewer = [number for number in range(stages - 1, 0, -1) if stages % number == 0]
    yield [
        (
            f"--pipeline-model-parallel-size {number}, where memory allows",
            dataclasses.replace(layout, stages=Stages.even(number), dp_size=layout.dp_size * stages // number),
            size,
        )
        for number in fewer
        if size >= layout.dp_size * stages // number
    ]
