"""The passes of a training step through Megatron's pipeline schedules.

Every function here is collective: all ranks of the run call it together, each with its own data-parallel share. Results exist on
the last pipeline stage, where the scores are made.

Shape letters: P pairs of the global batch, R responses of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rmipo.data.loader import RankBatch
from megatron_rmipo.data.packing import PackedRow
from megatron_rmipo.objectives.base import Objective, PairLogps
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


@dataclasses.dataclass(frozen=True)
class PairMetrics:
    """What the objective said of each pair of a global batch, on the CPU, the same on every rank.

    Attributes:
        values: name -> fp32 ``[P]``, in the order of the global batch; ``loss`` among them.
        distributions: names whose percentiles are worth showing.
    """

    values: dict[str, Tensor]
    distributions: tuple[str, ...] = ()


def response_sums(logprobs: Tensor, row: PackedRow) -> Tensor:
    """Sum of log-probs per response, fp32 ``[R]``, from ``[N]`` log-probs of a row's scored tokens.

    Summed in float64 in a fixed order: sums near -5000 keep their digits, and two runs agree to the bit.
    """
    lengths = row.lengths.to(logprobs.device)
    sums = torch.segment_reduce(logprobs.to(torch.float64), "sum", lengths=lengths, unsafe=True)
    return sums.to(torch.float32)


def unconditional_pass(model: torch.nn.Module, batch: RankBatch) -> Tensor:
    """Log p(y) of every response of this rank's share, forward only.

    Returns:
        fp32 ``[P, 2, 2]`` on the CPU: (sum, scored tokens) of (chosen, rejected) by pair of the global batch; zero for pairs of
        other ranks, and everywhere but on the last stage.
    """

    def collect(row: PackedRow, logprobs: Tensor, non_loss_data: bool = False) -> tuple[PackedRow, Tensor]:
        return row, response_sums(logprobs, row)

    outputs = _run_schedule(model, batch.unconditional, collect, forward_only=True)
    scores = torch.zeros(batch.num_pairs, 2, 2)
    for row, sums in outputs:
        counts = row.pair_numbers >= 0
        numbers, branches = row.pair_numbers[counts], row.branches[counts]
        scores[numbers, branches, 0] = sums.cpu()[counts]
        scores[numbers, branches, 1] = row.lengths[counts].to(torch.float32)
    return scores


def gradient_pass(
    model: torch.nn.Module, batch: RankBatch, objective: Objective, unconditional: Tensor | None, groups: ProcessGroups
) -> PairMetrics:
    """Forward and backward over this rank's packs; gradients end up as the exact mean over the global batch's pairs."""
    compute = partial(_pair_losses, objective=objective, batch=batch, unconditional=unconditional)

    def loss_function(row: PackedRow, logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        losses, report = compute(row, logprobs)
        counts = row.pair_numbers.view(losses.numel(), -1)[:, 0] >= 0
        # Megatron divides the gradient by the number of pairs over all packs and data-parallel ranks.
        num_pairs = counts.sum().to(torch.int).to(losses.device)
        return torch.where(counts.to(losses.device), losses, 0.0).sum(), num_pairs, report

    reports = _run_schedule(model, batch.conditional, loss_function, forward_only=False)
    return _gather_pair_metrics(reports, batch.num_pairs, groups)


def evaluation_pass(
    model: torch.nn.Module, batch: RankBatch, objective: Objective, unconditional: Tensor | None, groups: ProcessGroups
) -> PairMetrics:
    """The same metrics as the gradient pass, forward only."""
    compute = partial(_pair_losses, objective=objective, batch=batch, unconditional=unconditional)

    def collect(row: PackedRow, logprobs: Tensor, non_loss_data: bool = False) -> dict[str, Any]:
        return compute(row, logprobs)[1]

    reports = _run_schedule(model, batch.conditional, collect, forward_only=True)
    return _gather_pair_metrics(reports, batch.num_pairs, groups)


def _run_schedule(model: torch.nn.Module, rows: Sequence[PackedRow], finish: Any, *, forward_only: bool) -> list[Any]:
    """Run rows as micro-batches through Megatron's schedule; what ``finish(row, logprobs)`` gave, on the last stage."""

    def forward_step(iterator: Iterator[PackedRow], model: torch.nn.Module) -> tuple[Tensor, Any]:
        row = next(iterator)
        device = current_device()
        output = model(
            token_ids=row.token_ids.to(device),
            position_ids=row.position_ids.to(device),
            segments=row.segments,
            source=row.source.to(device),
            target=row.target.to(device),
        )
        return output, partial(finish, row)

    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        # Shapes travel with the activations; this one is only asked for.
        seq_length=rows[0].num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs


def _pair_losses(
    row: PackedRow, logprobs: Tensor, *, objective: Objective, batch: RankBatch, unconditional: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """Losses of the row's pairs (with gradient) and what to report of them."""
    branches = 2 if objective.needs.rejected else 1
    sums = response_sums(logprobs, row).view(-1, branches)
    lengths = row.lengths.view(-1, branches).to(sums.device, torch.float32)
    numbers = row.pair_numbers.view(-1, branches)[:, 0]
    extra: dict[str, Tensor] = {}
    if unconditional is not None:
        # A filler reads pair 0's score; its loss does not count.
        scores = unconditional[numbers.clamp(min=0)].to(sums.device)
        extra = {
            "uncond_chosen_logps": scores[:, 0, 0],
            "uncond_chosen_lengths": scores[:, 0, 1],
            "uncond_rejected_logps": scores[:, 1, 0],
            "uncond_rejected_lengths": scores[:, 1, 1],
        }
    absent = torch.zeros_like(sums[:, 0])
    output = objective(
        PairLogps(
            chosen_logps=sums[:, 0],
            rejected_logps=sums[:, 1] if branches == 2 else absent,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1] if branches == 2 else absent + 1,
            mean_chosen_length=torch.tensor(batch.mean_chosen_length, device=sums.device),
            **extra,
        )
    )
    values = {"loss": output.losses.detach(), **output.metrics}
    return output.losses, {"numbers": numbers, "values": values, "distributions": output.distributions}


def _gather_pair_metrics(reports: list[dict[str, Any]], num_pairs: int, groups: ProcessGroups) -> PairMetrics:
    """Put every rank's reports in the order of the global batch: one reduction, then one broadcast to the other stages."""
    payload: list[Any] = [None]
    if groups.is_last_stage:
        names = list(reports[0]["values"])
        table = torch.zeros(len(names), num_pairs, device=current_device())
        for report in reports:
            counts = report["numbers"] >= 0
            stacked = torch.stack([report["values"][name].to(torch.float32) for name in names])
            table[:, report["numbers"][counts]] = stacked[:, counts.to(stacked.device)]
        # Each pair is one rank's, so the sum is that rank's value to the bit, whatever the layout.
        dist.all_reduce(table, group=groups.dp)
        payload = [(names, table.cpu(), reports[0]["distributions"])]
    if groups.pp_size > 1:
        last_stage = dist.get_global_rank(groups.pp, groups.pp_size - 1)
        dist.broadcast_object_list(payload, src=last_stage, group=groups.pp, device=current_device())
    names, table, distributions = payload[0]
    return PairMetrics(dict(zip(names, table, strict=True)), distributions)
