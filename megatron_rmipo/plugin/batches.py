"""Prepared pairs as the micro-batches that other people's loops take from an iterator."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterator
from typing import Literal

from megatron_rmipo.data.batches.loader import BatchBuilder, BatchLayout, RankBatch, iterate_batches
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.packing import PackedRow
from megatron_rmipo.data.batches.sizes import BY_TOKENS, CostModel, check_capacity
from megatron_rmipo.data.store.collection import PairData, open_pairs
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.runtime.groups import ProcessGroups


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One row of a global batch.

    Attributes:
        batch: the global batch, as this data-parallel rank sees it.
        number: which of its rows with gradient.
    """

    batch: RankBatch
    number: int

    @property
    def row(self) -> PackedRow:
        """The row, on the CPU."""
        return self.batch.conditional[self.number]


class PreferenceBatches(Iterator[Microbatch]):
    """Micro-batches of a run, one after the other, the same number for each global batch.

    Args:
        batches: the run's global batches, as this rank sees them.
        consumed_pairs: pairs of the run that were seen before.
    """

    def __init__(self, batches: Iterator[RankBatch], *, consumed_pairs: int = 0) -> None:
        self.consumed_pairs = consumed_pairs
        self._batches = batches
        self._upcoming: deque[Microbatch] = deque()

    def __next__(self) -> Microbatch:
        microbatch = self._first()
        self._upcoming.popleft()
        if not self._upcoming:
            self.consumed_pairs += microbatch.batch.num_pairs
        return microbatch

    def peek(self) -> RankBatch:
        """The global batch of the next micro-batch, which is not taken: for a pass over it before the schedule starts.

        Raises:
            StopIteration: the run is over.
        """
        return self._first().batch

    def _first(self) -> Microbatch:
        if not self._upcoming:
            batch = next(self._batches)
            self._upcoming.extend(Microbatch(batch, number) for number in range(len(batch.conditional)))
        return self._upcoming[0]


def preference_batches(
    data: PairData,
    objective: Objective,
    *,
    global_batch_size: int,
    num_microbatches: int,
    tokens_per_microbatch: int | None = None,
    total_pairs: int | None = None,
    consumed_pairs: int = 0,
    seed: int = 1234,
    unconditional: Literal["rows", "pass"] = "rows",
    context_token_id: int | None = None,
    share_prompts: bool = True,
    multiple_of: int = 1,
    cost: CostModel | None = None,
    groups: ProcessGroups | None = None,
    num_workers: int = 0,
) -> PreferenceBatches:
    """Micro-batches for this rank, on every pipeline stage the same. No communication.

    Args:
        data: ``PREFIX`` of prepared data, several, a collection that has what the objective reads beside the pairs, or
            ``(prompt_ids, chosen_ids, rejected_ids)`` of each pair.
        objective: what is trained; it says which responses are laid out.
        global_batch_size: pairs of a step, over all data-parallel ranks.
        num_microbatches: rows of a step on each rank, the same at every step: what the loop gives Megatron's schedule.
        tokens_per_microbatch: most tokens of a row; None: as many as come together.
        total_pairs: pairs of the run; None: one epoch.
        consumed_pairs: pairs seen before; the order goes on from there.
        seed: of the order.
        unconditional: where log p(y) comes from, should the objective read it: ``rows`` lays the responses alone into the rows
            of the gradient pass, ``pass`` leaves them to :meth:`megatron_rmipo.plugin.step.PreferenceStep.before_step`.
        context_token_id: the token before a response in log p(y), BOS as a rule; None: its first token is not scored.
        share_prompts: a prompt stands once for both responses.
        multiple_of: rows are padded to a multiple of this many tokens, TP under sequence parallelism; with
            ``tokens_per_microbatch`` all are equally long, as pipelines without ``variable_seq_lengths`` want them.
        cost: what packs are balanced by; None: tokens.
        groups: the process groups of this rank; None: Megatron's.
        num_workers: processes that prepare batches ahead.

    Raises:
        ConfigError: a pair fits no row.
        DataError: a data set is missing or incomplete.
    """
    groups = groups or ProcessGroups.of_megatron()
    pairs = open_pairs(data)
    needs = objective.needs
    if needs.mismatched and pairs.mismatched is None:
        pairs.match_anew()
    layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        tokens_per_microbatch=sys.maxsize if tokens_per_microbatch is None else tokens_per_microbatch,
        cost=cost or BY_TOKENS,
        share_prompts=share_prompts,
        with_rejected=needs.rejected,
        unconditional="none" if needs.unconditional == "bos" and context_token_id is None else needs.unconditional,
        unconditional_in_rows=unconditional == "rows",
        bos_token_id=context_token_id,
        columns=needs.columns,
        multiple_of=multiple_of,
        # Ranks that meet in layers of experts run as many rows in the passes before the step, too.
        equal_packs=groups.ep.size() > 1,
        num_microbatches=num_microbatches,
    )
    if tokens_per_microbatch is not None:
        check_capacity(layout.gradient_sizes(pairs.lengths), tokens_per_microbatch, pairs.describe)
    if needs.reference and pairs.reference_scores is None:
        raise ConfigError(
            f"objective {objective.name} compares with a reference, and the data has no log-probs of one: "
            "give it some with megatron_rmipo.plugin.score_reference(model, pairs, objective, ...) first."
        )
    batches = iterate_batches(
        BatchBuilder(pairs, layout),
        PairOrder(len(pairs), seed),
        batch_size=global_batch_size,
        total_pairs=len(pairs) if total_pairs is None else total_pairs,
        consumed_pairs=consumed_pairs,
        num_workers=num_workers,
    )
    return PreferenceBatches(batches, consumed_pairs=consumed_pairs)
