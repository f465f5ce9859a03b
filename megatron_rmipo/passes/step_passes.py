"""The passes of a training step, and of an evaluation: what has to be known of the global batch first, then its losses.

Every function here is collective: all ranks of the run call it together, each with its own data-parallel share.

Shape letter: P pairs of the global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.model.logprobs import ReferenceHead
from megatron_rmipo.model.lora.switch import AdapterView, viewed
from megatron_rmipo.model.packed_model import Chunks, chunks_of, head_weight, scoring_options
from megatron_rmipo.objectives.base import BatchLogps, Objective, State
from megatron_rmipo.objectives.contract import check_prepared
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.passes.pair_losses import KnownPairs, Prepared, RowLosses, as_tensors, row_losses
from megatron_rmipo.passes.rows import from_last_stage, gather_pairs, run_rows, score_responses
from megatron_rmipo.runtime.groups import ProcessGroups, current_device
from megatron_rmipo.runtime.tracing import trace_range


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
    model: Chunks,
    batch: RankBatch,
    objective: Objective,
    state: State,
    groups: ProcessGroups,
    reference: Chunks | AdapterView | None = None,
) -> Prepared:
    """Run the forward-only passes the objective declares, and let it look at the global batch.

    Args:
        model: the policy, or its chunks, in evaluation mode, so that activations are not recomputed.
        batch: this rank's share.
        objective: what is trained.
        state: of the objective; it is not changed.
        groups: the process groups of this rank.
        reference: the resident reference, for objectives that need one; or its chunks, or the policy with another adapter.
    """
    needs = objective.needs
    unconditional = _score("unconditional pass", model, batch.unconditional, batch) if batch.unconditional else None
    scores = _score("batch pass", model, batch.conditional, batch) if needs.batch else None
    mismatched = _score("mismatched pass", model, batch.mismatched, batch) if batch.mismatched else None
    references: list[ReferenceHead] = []
    if needs.perturbation is not None:
        assert reference is not None
        with trace_range("reference pass"), viewed(reference) as chunks:
            keep = lambda row, output: output  # noqa: E731
            hidden = run_rows(chunks, batch.conditional, keep, name="reference pass", backward=False, scores=False)
            references = _heads(chunks, hidden, needs.perturbation)
    if not groups.is_last_stage:
        return Prepared()
    prepared = objective.prepare(_whole_batch(batch, scores, mismatched, groups), state)
    check_prepared(objective, prepared, batch.num_pairs)
    return Prepared(unconditional, prepared, references)


def _heads(reference: Chunks, hidden: Sequence[Tensor], epsilon: float) -> list[ReferenceHead]:
    """Hidden states of rows under the reference, with its output layer; none but on the last stage."""
    if not hidden:
        return []
    last = chunks_of(reference)[-1]
    # Of a head that is trained beside an adapter, what it is in the reference.
    weight, rules = head_weight(last).detach(), scoring_options(last).logits
    # Megatron's wrapper for mixed precision gives fp32 out of a model, of the same value.
    return [ReferenceHead(one.to(weight.dtype), weight, epsilon, rules) for one in hidden]


def _score(name: str, model: Chunks, rows: Sequence[Row], batch: RankBatch) -> Tensor:
    with trace_range(name):
        return score_responses(model, rows, batch.num_pairs, name=name)


def _whole_batch(batch: RankBatch, scores: Tensor | None, mismatched: Tensor | None, groups: ProcessGroups) -> BatchLogps:
    pairs = None
    if scores is not None:
        scores = gather_pairs(scores, groups)
        reference = batch.reference_scores
        pairs = pair_logps(
            PairSums(*scores.unbind(2)),
            mean_chosen_length=torch.tensor(batch.mean_chosen_length),
            reference=None if reference is None else torch.from_numpy(reference),
            columns=as_tensors(batch.columns),
        )
    has_response = torch.from_numpy(batch.lengths[:, 1:] > 0)
    if mismatched is not None:
        mismatched = gather_pairs(mismatched, groups)
        has_response = mismatched[:, :, 1] > 0
    ref_mismatched = batch.mismatched_reference_scores
    return BatchLogps(
        pairs=pairs,
        mismatched_logps=mismatched[:, :, 0] if mismatched is not None else None,
        ref_mismatched_logps=torch.from_numpy(ref_mismatched) if ref_mismatched is not None else None,
        has_response=has_response,
    )


def gradient_pass(
    model: Chunks, batch: RankBatch, objective: Objective, prepared: Prepared, groups: ProcessGroups
) -> PairMetrics:
    """Forward and backward over this rank's packs; gradients end up as the exact mean over the global batch's pairs."""
    known = KnownPairs.of(batch, prepared)

    def finish(row: Row, logprobs: Tensor) -> tuple[Tensor, Tensor, RowLosses]:
        found = row_losses(row, logprobs, objective=objective, known=known)
        return *found.sum_and_count(), found.detached()

    reports = run_rows(model, batch.conditional, finish, name="gradient pass", backward=True, references=prepared.references)
    return gather_pair_metrics(reports, batch.num_pairs, prepared, groups)


def evaluation_pass(
    model: Chunks, batch: RankBatch, objective: Objective, prepared: Prepared, groups: ProcessGroups
) -> PairMetrics:
    """The same metrics as the gradient pass, forward only."""
    compute = partial(row_losses, objective=objective, known=KnownPairs.of(batch, prepared))
    reports = run_rows(model, batch.conditional, compute, name="evaluation pass", backward=False, references=prepared.references)
    return gather_pair_metrics(reports, batch.num_pairs, prepared, groups)


def gather_pair_metrics(reports: Sequence[RowLosses], num_pairs: int, prepared: Prepared, groups: ProcessGroups) -> PairMetrics:
    """Put every rank's reports in the order of the global batch: one reduction, then one broadcast to the other stages.

    Args:
        reports: of this rank's rows on the last stage; not read elsewhere.
        num_pairs: P.
        prepared: what the losses were told of the batch.
        groups: the process groups of this rank.
    """
    payload = None
    if groups.is_last_stage:
        names = list(reports[0].values)
        numbers = torch.cat([report.numbers for report in reports])
        values = [torch.cat([report.values[name] for report in reports]).to(torch.float32) for name in names]
        # One place more at the end, where a filler's number, -1, writes.
        table = torch.zeros(len(names), num_pairs + 1, device=current_device())
        table[:, numbers] = torch.stack(values)
        payload = (names, gather_pairs(table[:, :num_pairs], groups), reports[0].distributions, dict(prepared.batch))
    names, table, distributions, prepared_batch = from_last_stage(payload, groups)
    return PairMetrics(dict(zip(names, table, strict=True)), distributions, prepared_batch)
