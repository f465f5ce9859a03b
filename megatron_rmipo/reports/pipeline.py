"""What share of a step pipeline stages stood still."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.pipeline_bubble import Stages, even_length, idle_share, simulated_length
from megatron_rmipo.reports.timers import StageClock
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

NAME = "pipeline_bubble"


def pipeline_bubble(
    batch: RankBatch, stages: Stages, clock: StageClock | None, phases: Mapping[str, float], groups: ProcessGroups
) -> dict[str, float]:
    """The idle share of a step over all stages of all replicas. All ranks call it together.

    Args:
        batch: this rank's share of the step's pairs.
        stages: of the pipeline.
        clock: of this rank's stage, set back before the step; None where it tells nothing.
        phases: seconds of the step by phase (:class:`megatron_rmipo.reports.timers.PhaseTimer`).
        groups: the process groups of this rank.

    Returns:
        ``pipeline_bubble``, by what packs cost; ``pipeline_bubble/even``, if all packs and stages cost the same;
        ``pipeline_bubble/measured``, with a clock, of the passes' seconds. Empty without pipeline stages.
    """
    num_stages = stages.num_stages
    if num_stages == 1:
        return {}
    lengths = torch.tensor(
        [simulated_length(batch.passes, stages), even_length(batch.passes, stages)],
        dtype=torch.float64,
        device=current_device(),
    )
    dist.all_reduce(lengths, op=dist.ReduceOp.MAX, group=groups.world)
    by_cost, even = (idle_share(batch.cost, length, num_stages, groups.dp_size) for length in lengths.tolist())
    found = {NAME: by_cost, f"{NAME}/even": even}
    if clock is not None:
        seconds = torch.tensor([clock.busy_seconds, phases["before"] + phases["gradient"]], dtype=torch.float64)
        dist.all_reduce(seconds, group=groups.world)
        busy, passed = seconds.tolist()
        found[f"{NAME}/measured"] = 1.0 - busy / passed
    return found
