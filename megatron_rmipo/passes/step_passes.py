"""The passes of a training step, and of an evaluation: what has to be known of the global batch first, then its losses.

Every function here is collective: all ranks of the run call it together, each with its own data-parallel share.

Shape letter: P pairs of the global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.batches.loader import RankBatch
from megatron_rmipo.data.batches.packing import PackedRow
from megatron_rmipo.model.logprobs import ReferenceHead
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.base import BatchLogps, Objective, PairLogps, State
from megatron_rmipo.objectives.contract import check_output, check_prepared
from megatron_rmipo.passes.rows import from_last_stage, gather_pairs, response_sums, run_rows, score_responses
from megatron_rmipo.runtime.groups import ProcessGroups, current_device
from megatron_rmipo.runtime.tracing import trace_range
from megatron_rmipo.runtime.transfers import to_device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the passes before the losses found. Empty but on the last stage.

    Attributes:
        unconditional: fp32 ``[P, 2, 2]`` on the device, see :func:`megatron_rmipo.passes.rows.score_responses`; pairs of this
            rank alone.
        batch: what :meth:`Objective.prepare` gave, on the CPU, the same on every data-parallel rank.
        references: for each conditional row, its scored tokens' hidden states under the resident reference.
    """

    unconditional: Tensor | None
    batch: Mapping[str, Tensor]
    references: Sequence[ReferenceHead]


@dataclasses.dataclass(frozen=True)
class _KnownPairs:
    """What passes before the losses, and the reference, said of the pairs of the global batch; all on the device.

    Attributes:
        unconditional: as in :class:`Prepared`.
        reference: fp32 ``[P, 2]``, sums under the reference of (chosen, rejected); None where not needed.
        columns: fp32 ``[P]`` each, numbers beside the pairs.
        batch: fp32, what :meth:`Objective.prepare` gave.
        mean_chosen_length: fp32 scalar.
    """

    unconditional: Tensor | None
    reference: Tensor | None
    columns: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    mean_chosen_length: Tensor

    @classmethod
    def of(cls, batch: RankBatch, prepared: Prepared) -> _KnownPairs:
        """Move to the device what is not there yet, once for all packs."""
        return cls(
            unconditional=prepared.unconditional,
            reference=None if batch.reference_scores is None else to_device(torch.from_numpy(batch.reference_scores)),
            columns={name: to_device(values) for name, values in _as_tensors(batch.columns).items()},
            batch={name: to_device(values.to(torch.float32)) for name, values in prepared.batch.items()},
            # Not torch.tensor, which would copy, and wait.
            mean_chosen_length=torch.full((), batch.mean_chosen_length, device=current_device()),
        )

    def of_pairs(self, numbers: Tensor) -> dict[str, Any]:
        """Fields of :class:`PairLogps` for some pairs, numbers ``[pairs]`` of the global batch on the device."""
        # A filler reads what is known of pair 0; its loss does not count.
        numbers = numbers.clamp(min=0)
        known: dict[str, Any] = {"mean_chosen_length": self.mean_chosen_length}
        if self.unconditional is not None:
            scores = self.unconditional[numbers]
            known["uncond_chosen_logps"], known["uncond_chosen_lengths"] = scores[:, 0].unbind(1)
            known["uncond_rejected_logps"], known["uncond_rejected_lengths"] = scores[:, 1].unbind(1)
        if self.reference is not None:
            known["ref_chosen_logps"], known["ref_rejected_logps"] = self.reference[numbers].unbind(1)
        known["columns"] = {name: values[numbers] for name, values in self.columns.items()}
        known["batch"] = {name: values[numbers] if values.dim() else values for name, values in self.batch.items()}
        return known


@dataclasses.dataclass(frozen=True)
class PairMetrics:
    """What the objective said of each pair of a global batch, on the CPU, the same on every rank.

    Attributes:
        values: name -> fp32 ``[P]``, in the order of the global batch; ``loss`` among them.
        distributions: names whose percentiles are worth showing.
        batch: what :meth:`Objective.prepare` gave for the batch.
    """

    values: dict[str, Tensor]
    distributions: tuple[str, ...] = ()
    batch: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@torch.no_grad()
def prepare_batch(
    model: torch.nn.Module,
    batch: RankBatch,
    objective: Objective,
    state: State,
    groups: ProcessGroups,
    reference: PolicyModel | None = None,
) -> Prepared:
    """Run the forward-only passes the objective declares, and let it look at the global batch.

    Args:
        model: the policy in evaluation mode, so that activations are not recomputed.
        batch: this rank's share.
        objective: what is trained.
        state: of the objective; it is not changed.
        groups: the process groups of this rank.
        reference: the resident reference, for objectives that need one.
    """
    needs = objective.needs
    unconditional = _score("unconditional pass", model, batch.unconditional, batch) if batch.unconditional else None
    scores = _score("batch pass", model, batch.conditional, batch) if needs.batch else None
    mismatched = _score("mismatched pass", model, batch.mismatched, batch) if batch.mismatched else None
    references: list[ReferenceHead] = []
    if needs.perturbation is not None:
        assert reference is not None
        with trace_range("reference pass"):
            keep = lambda row, output: output  # noqa: E731
            hidden = run_rows(reference, batch.conditional, keep, name="reference pass", backward=False, scores=False)
        rules = reference.scoring_options.logits
        references = [ReferenceHead(one, reference.head_weight(), needs.perturbation, rules) for one in hidden]
    if not groups.is_last_stage:
        return Prepared(None, {}, [])
    prepared = objective.prepare(_whole_batch(batch, scores, mismatched, groups), state)
    check_prepared(objective, prepared, batch.num_pairs)
    return Prepared(unconditional, prepared, references)


def _score(name: str, model: torch.nn.Module, rows: Sequence[PackedRow], batch: RankBatch) -> Tensor:
    with trace_range(name):
        return score_responses(model, rows, batch.num_pairs, name=name)


def _whole_batch(batch: RankBatch, scores: Tensor | None, mismatched: Tensor | None, groups: ProcessGroups) -> BatchLogps:
    pairs = None
    if scores is not None:
        scores = gather_pairs(scores, groups)
        pairs = PairLogps(
            chosen_logps=scores[:, 0, 0],
            rejected_logps=scores[:, 1, 0],
            chosen_lengths=scores[:, 0, 1],
            rejected_lengths=scores[:, 1, 1],
            mean_chosen_length=torch.tensor(batch.mean_chosen_length),
            columns=_as_tensors(batch.columns),
            **_reference_fields(batch.reference_scores),
        )
    has_response = torch.from_numpy(batch.lengths[:, 1:] > 0)
    if mismatched is not None:
        mismatched = gather_pairs(mismatched, groups)
        has_response = mismatched[:, :, 1] > 0
    reference = batch.mismatched_reference_scores
    return BatchLogps(
        pairs=pairs,
        mismatched_logps=mismatched[:, :, 0] if mismatched is not None else None,
        ref_mismatched_logps=torch.from_numpy(reference) if reference is not None else None,
        has_response=has_response,
    )


def _as_tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def _reference_fields(scores: np.ndarray | None) -> dict[str, Any]:
    if scores is None:
        return {}
    table = torch.from_numpy(scores)
    return {"ref_chosen_logps": table[:, 0], "ref_rejected_logps": table[:, 1]}


def gradient_pass(
    model: torch.nn.Module, batch: RankBatch, objective: Objective, prepared: Prepared, groups: ProcessGroups
) -> PairMetrics:
    """Forward and backward over this rank's packs; gradients end up as the exact mean over the global batch's pairs."""
    known = _KnownPairs.of(batch, prepared)

    def finish(row: PackedRow, logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        losses, report = _pair_losses(row, logprobs, objective=objective, known=known)
        counts = report["numbers"] >= 0
        # Megatron divides the gradient by the number of pairs over all packs and data-parallel ranks.
        return torch.where(counts, losses, 0.0).sum(), counts.sum().to(torch.int), report

    reports = run_rows(model, batch.conditional, finish, name="gradient pass", backward=True, references=prepared.references)
    return _gather_pair_metrics(reports, batch.num_pairs, prepared, groups)


def evaluation_pass(
    model: torch.nn.Module, batch: RankBatch, objective: Objective, prepared: Prepared, groups: ProcessGroups
) -> PairMetrics:
    """The same metrics as the gradient pass, forward only."""
    compute = partial(_pair_losses, objective=objective, known=_KnownPairs.of(batch, prepared))
    finish = lambda row, logprobs: compute(row, logprobs)[1]  # noqa: E731
    reports = run_rows(model, batch.conditional, finish, name="evaluation pass", backward=False, references=prepared.references)
    return _gather_pair_metrics(reports, batch.num_pairs, prepared, groups)


def _pair_losses(row: PackedRow, logprobs: Tensor, *, objective: Objective, known: _KnownPairs) -> tuple[Tensor, dict[str, Any]]:
    """Losses of the row's pairs (with gradient) and what to report of them."""
    branches = 2 if objective.needs.rejected else 1
    sums = response_sums(logprobs, row)
    # One line of sums, or four with a resident reference, each [pairs, branches].
    policy, *others = sums.view(-1, *row.lengths.view(-1, branches).shape)
    lengths = row.lengths.view(-1, branches).to(torch.float32)
    numbers = row.pair_numbers.view(-1, branches)[:, 0]
    absent = torch.zeros_like(policy[:, 0])
    output = objective(
        PairLogps(
            chosen_logps=policy[:, 0],
            rejected_logps=policy[:, 1] if branches == 2 else absent,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1] if branches == 2 else absent + 1,
            # A reference in memory, where there is one, says the same as what was kept of it.
            **{**known.of_pairs(numbers), **_resident_fields(others)},
        )
    )
    check_output(objective, output, numbers.numel())
    values = {"loss": output.losses.detach(), **output.metrics}
    return output.losses, {"numbers": numbers, "values": values, "distributions": output.distributions}


def _resident_fields(others: Sequence[Tensor]) -> dict[str, Any]:
    """Sums under the reference and under both mixtures, as :class:`PairLogps` names them, from ``[pairs, 2]`` each."""
    fields = {}
    for prefix, sums in zip(("ref", "extrapolated", "interpolated"), others, strict=False):
        fields[f"{prefix}_chosen_logps"], fields[f"{prefix}_rejected_logps"] = sums.detach().unbind(1)
    return fields


def _gather_pair_metrics(reports: list[dict[str, Any]], num_pairs: int, prepared: Prepared, groups: ProcessGroups) -> PairMetrics:
    """Put every rank's reports in the order of the global batch: one reduction, then one broadcast to the other stages."""
    payload = None
    if groups.is_last_stage:
        names = list(reports[0]["values"])
        numbers = torch.cat([report["numbers"] for report in reports])
        values = [torch.cat([report["values"][name] for report in reports]).to(torch.float32) for name in names]
        # One place more at the end, where a filler's number, -1, writes.
        table = torch.zeros(len(names), num_pairs + 1, device=current_device())
        table[:, numbers] = torch.stack(values)
        payload = (names, gather_pairs(table[:, :num_pairs], groups), reports[0]["distributions"], dict(prepared.batch))
    names, table, distributions, prepared_batch = from_last_stage(payload, groups)
    return PairMetrics(dict(zip(names, table, strict=True)), distributions, prepared_batch)
