"""The step of preference optimization in somebody else's training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.data.batches.loader import RankBatch
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.packed_model import Chunks, unwrapped
from megatron_rmipo.objectives.base import Objective, State
from megatron_rmipo.objectives.contract import check_state
from megatron_rmipo.passes.pair_losses import KnownPairs, Prepared, RowLosses, row_losses
from megatron_rmipo.passes.rows import check_lengths, check_rows, evaluating, on_device, row_output
from megatron_rmipo.passes.step_passes import PairMetrics, gather_pair_metrics, prepare_batch
from megatron_rmipo.plugin.batches import Microbatch
from megatron_rmipo.runtime.groups import ProcessGroups


class PreferenceStep:
    """``forward_step`` of a Megatron loop: a micro-batch through the model, and the loss of its pairs.

    What the loss function gives is (sum over pairs, number of pairs, report), so that with ``calculate_per_token_loss`` the
    gradient is the mean over the pairs of the global batch, however it is cut. The report's values are ``[sum, number]`` tensors.

    What an objective must know of the whole batch before its losses, :meth:`before_step` finds out where the loop calls it before
    the schedule starts. Without such a call it is done in the step's first forward where there is one pipeline stage.

    Args:
        objective: what is trained.
        reference: of objectives that keep one in memory: an attached model on this rank, frozen, or its chunks.
        groups: the process groups of this rank; None: Megatron's.

    Attributes:
        objective, reference, groups: as given.
        state: what the objective carries from step to step.
    """

    def __init__(self, objective: Objective, *, reference: Chunks | None = None, groups: ProcessGroups | None = None) -> None:
        self.objective = objective
        self.reference = reference
        self.groups = groups or ProcessGroups.of_megatron()
        self.state: State = dict(objective.initial_state())
        self._current: RankBatch | None = None
        self._prepared = Prepared()
        self._known: KnownPairs | None = None
        self._reports: list[RowLosses] = []
        self._advances = False

    def __call__(
        self, data_iterator: Iterator[Microbatch], model: Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Any]:
        """Run the next micro-batch; what Megatron's schedules call.

        Raises:
            ConfigError: the loop would not take the mean over pairs, or the objective needs :meth:`before_step`.
        """
        if return_schedule_plan:
            raise ConfigError(
                "overlap_moe_expert_parallel_comm wants a schedule plan, which packed rows have none of; leave it out."
            )
        microbatch = next(data_iterator)
        if microbatch.batch is not self._current:
            check_rows(model, microbatch.batch.rows, microbatch.batch.lengths)
            check_lengths(model, microbatch.batch.conditional, backward=model.training)
            _check_loop(model)
            self._begin_in_forward(model, microbatch.batch)
        row = on_device(microbatch.row)
        reference = self._prepared.references[microbatch.number] if self._prepared.references else None
        return row_output(model, row, reference), partial(self._loss, row)

    def before_step(self, model: Chunks, batch: RankBatch) -> None:
        """Find out what the objective must know of a batch before its losses. All ranks call it together, before the schedule.

        Args:
            model: as the schedule takes it, with interleaved pipelines the list of its chunks.
            batch: whose micro-batches come next: ``batches.peek()``.
        """
        check_rows(model, batch.rows, batch.lengths)
        self._advance()
        with evaluating(model) as trains:
            prepared = prepare_batch(model, batch, self.objective, self.state, self.groups, self.reference)
        self._begin(batch, prepared, advances=trains)

    def after_step(self, *, updated: bool = True) -> PairMetrics:
        """Metrics of the batch that was run, and what the objective carries on from it. All ranks call it together.

        Args:
            updated: whether the optimizer took the step; the objective's state stays as it is if not.
        """
        assert self._current is not None, "no batch was run"
        metrics = gather_pair_metrics(self._reports, self._current.num_pairs, self._prepared, self.groups)
        if updated and self._advances:
            self.state = self.objective.advance(self.state, metrics.batch, metrics.values)
            check_state(self.objective, self.state)
        self._advances = False
        return metrics

    def _advance(self) -> None:
        """What a loop without :meth:`after_step` leaves to be done before the next batch."""
        if self._advances and self.state:
            self.after_step()

    def _begin_in_forward(self, model: Module, batch: RankBatch) -> None:
        needs = self.objective.needs
        reasons: Mapping[str, bool] = {
            "log p(y) in a pass of its own": bool(batch.unconditional),
            "log-probs of the whole batch": needs.batch,
            "log-probs of mismatched pairs": bool(batch.mismatched),
            "a reference in memory": needs.perturbation is not None,
            "a state that goes from step to step": bool(self.state),
        }
        wanted = [reason for reason, holds in reasons.items() if holds]
        if not wanted:
            self._begin(batch, Prepared(), advances=False)
        elif self.groups.pp_size == 1:
            self.before_step(model, batch)
        else:
            raise ConfigError(
                f"objective {self.objective.name} reads {', '.join(wanted)}, found out in passes over all pipeline stages, which "
                "cannot start inside of a schedule. Call step.before_step(model, batches.peek()) before it, each step."
            )

    def _begin(self, batch: RankBatch, prepared: Prepared, *, advances: bool) -> None:
        self._current, self._prepared, self._advances = batch, prepared, advances
        self._known = KnownPairs.of(batch, prepared)
        self._reports = []

    def _loss(self, row: Any, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert self._known is not None
        found = row_losses(row, output, objective=self.objective, known=self._known)
        self._reports.append(found.detached())
        return *found.sum_and_count(), _report(found)


def _report(found: RowLosses) -> dict[str, Tensor]:
    """Name -> ``[sum, number]`` over the row's pairs that have such a value, fp32."""
    report = {}
    for name, values in found.values.items():
        counts = (found.numbers >= 0) & ~torch.isnan(values) if name != "loss" else found.numbers >= 0
        report[name] = torch.stack([torch.where(counts, values, 0.0).sum(), counts.sum().to(values.dtype)])
    return report


def _check_loop(model: Module) -> None:
    """Refuse a loop that would divide the gradient by something else than the number of pairs."""
    config = unwrapped(model).config
    if not config.calculate_per_token_loss:
        raise ConfigError(
            "the model's config has calculate_per_token_loss=False: the loss would be a mean of means, which depends on how the "
            "batch is cut. Set it to True (--calculate-per-token-loss), for model and DDP."
        )
    if model.training and config.finalize_model_grads_func is None:
        raise ConfigError(
            "the model's config has no finalize_model_grads_func: nothing would divide the gradient by the number of pairs. Set "
            "config.finalize_model_grads_func = megatron.core.distributed.finalize_model_grads."
        )
