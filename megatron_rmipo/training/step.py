"""One optimizer step, and one evaluation: what the loop repeats."""

from __future__ import annotations

import dataclasses
import math

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.contract import check_state
from megatron_rmipo.passes.expert_load import set_auxiliary_losses
from megatron_rmipo.passes.pair_losses import Prepared
from megatron_rmipo.passes.step_passes import PairMetrics, evaluation_pass, gradient_pass, prepare_batch
from megatron_rmipo.reports.timers import PhaseTimer
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """What one step did, the same on every rank.

    Attributes:
        metrics: per pair of the global batch.
        grad_norm: L2 norm of the gradient over all parameters, before clipping.
        updated: False where a loss or the gradient was not finite and the weights stayed as they were.
        learning_rate: the one the step used.
    """

    metrics: PairMetrics
    grad_norm: float
    updated: bool
    learning_rate: float

    @property
    def offending_pairs(self) -> list[int]:
        """Numbers of the batch's pairs whose loss is not finite."""
        return torch.nonzero(~torch.isfinite(self.metrics.values["loss"])).flatten().tolist()


def train_step(
    state: TrainingState, batch: RankBatch, objective: Objective, groups: ProcessGroups, timer: PhaseTimer | None = None
) -> StepOutcome:
    """Passes, gradient norm, update. All ranks call it together; the timer is told of the phases of this one."""
    timer = timer or PhaseTimer()
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    with timer.phase("before"):
        prepared = _prepare(state, batch, objective, groups)
        set_auxiliary_losses(state.model, state.policy, batch, groups)
    state.model.train()
    with timer.phase("gradient"):
        metrics = gradient_pass(state.model, batch, objective, prepared, groups)
    learning_rate = float(state.optimizer.param_groups[0]["lr"])
    finite_losses = bool(torch.isfinite(metrics.values["loss"]).all())
    with timer.phase("optimizer"):
        grad_norm, updated = _update(state.optimizer, allowed=finite_losses)
    if updated:
        state.objective_state = objective.advance(state.objective_state, metrics.batch, metrics.values)
        check_state(objective, state.objective_state)
    # A skipped step still uses up its place in the schedule: the run's length is counted in batches seen.
    state.scheduler.step(increment=1)
    return StepOutcome(metrics, grad_norm, updated, learning_rate)


@torch.no_grad()
def evaluate_batch(state: TrainingState, batch: RankBatch, objective: Objective, groups: ProcessGroups) -> PairMetrics:
    """The objective's metrics for one batch, weights and objective state untouched. All ranks call it together."""
    prepared = _prepare(state, batch, objective, groups)
    return evaluation_pass(state.model, batch, objective, prepared, groups)


def _prepare(state: TrainingState, batch: RankBatch, objective: Objective, groups: ProcessGroups) -> Prepared:
    # Evaluation mode also switches activation recomputation off, which would only cost here.
    state.model.eval()
    return prepare_batch(state.model, batch, objective, state.objective_state, groups, state.reference)


@torch.no_grad()
def _update(optimizer: MegatronOptimizer, *, allowed: bool) -> tuple[float, bool]:
    """(gradient norm before clipping, whether the weights were updated).

    Megatron's own ``step`` clips and updates in one go; the norm has to be looked at in between, before weights are touched.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (allowed and math.isfinite(grad_norm)):
        return grad_norm, False
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                # The precision-aware optimizer reads gradients of another dtype than its parameters have.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    return grad_norm, bool(optimizer.step_with_ready_grads())
