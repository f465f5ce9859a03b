"""Log-ratios of a global batch, mean and spread of its gaps, and their moving averages from step to step.

Everything here sees whole global batches, in their order and in float64, the same on every rank: no result depends on how a batch
is cut. Shape letter: P pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import BatchLogps, State

EMA_DECAY = 0.9
EMA_BIAS_CORRECTION_HELP = (
    "divide moving averages by the weight they have gathered; off: they start at zero, as in the released code"
)

# Below these spreads (nats) the policy has not moved off its reference and what differs between the pairs is rounding: up to 4e-4
# on sums near -2000 in fp32, other digits in every parallel layout. Divided by its own spread it would be noise of order one.
# Divided by these it is less than 4e-3, and a spread that training makes (a nat and more on sums) does not come near them.
SUM_SPREAD_FLOOR = 0.1
MEAN_SPREAD_FLOOR = 1e-3


def batch_log_ratios(batch: BatchLogps) -> tuple[Tensor, Tensor]:
    """``(Lw - Rw, Ll - Rl)`` of every pair, float64 ``[P]`` each, without gradient."""
    pairs = batch.pairs
    assert pairs is not None
    assert pairs.ref_chosen_logps is not None
    assert pairs.ref_rejected_logps is not None
    chosen = pairs.chosen_logps.detach().double() - pairs.ref_chosen_logps.double()
    rejected = pairs.rejected_logps.detach().double() - pairs.ref_rejected_logps.double()
    return chosen, rejected


def reference_gaps(batch: BatchLogps, *, per_token: bool = False) -> Tensor:
    """``(Lw - Rw) - (Ll - Rl)`` of every pair, float64 ``[P]``; each ``L`` and ``R`` over its scored tokens if ``per_token``."""
    chosen, rejected = batch_log_ratios(batch)
    if per_token:
        assert batch.pairs is not None
        return chosen / batch.pairs.chosen_lengths.double() - rejected / batch.pairs.rejected_lengths.double()
    return chosen - rejected


def mean_gaps(batch: BatchLogps) -> Tensor:
    """``Lw / nw - Ll / nl`` of every pair, mean log-probs per scored token, float64 ``[P]``."""
    pairs = batch.pairs
    assert pairs is not None
    chosen = pairs.chosen_logps.detach().double() / pairs.chosen_lengths.double()
    return chosen - pairs.rejected_logps.detach().double() / pairs.rejected_lengths.double()


def mean_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation, ``[P]`` -> float64 scalars. One value has a spread of 0."""
    values = values.double()
    spread = values.std() if values.numel() > 1 else torch.zeros((), dtype=torch.float64)
    return values.mean(), spread


def z_scores(values: Tensor, mean: Tensor, spread: Tensor, floor: float) -> Tensor:
    """``(values - mean) / max(spread, floor)``, ``[P]`` -> float64 ``[P]``; 0 where nothing has ever spread."""
    if spread.item() == 0.0:
        return torch.zeros_like(values, dtype=torch.float64)
    return (values.double() - mean) / spread.clamp(min=floor)


def initial_averages() -> State:
    """State of the moving averages before the first batch: their sums, and how many batches are in them."""
    return {"gap_mean": 0.0, "gap_spread": 0.0, "num_batches": 0.0}


def updated_averages(state: State, values: Tensor) -> dict[str, Tensor]:
    """The sums of ``state`` with a batch's values added, float64 scalars: what :func:`advanced_averages` keeps."""
    mean, spread = mean_and_spread(values)
    return {
        "gap_mean": EMA_DECAY * state["gap_mean"] + (1.0 - EMA_DECAY) * mean,
        "gap_spread": EMA_DECAY * state["gap_spread"] + (1.0 - EMA_DECAY) * spread,
    }


def averages_in_use(state: State, updated: Mapping[str, Tensor], *, bias_correction: bool) -> tuple[Tensor, Tensor]:
    """Mean and spread from the sums that :func:`updated_averages` gave for ``state``, float64 scalars."""
    # The weights of n batches add up to 1 - decay^n.
    weight = 1.0 - EMA_DECAY ** (state["num_batches"] + 1.0) if bias_correction else 1.0
    return updated["gap_mean"] / weight, updated["gap_spread"] / weight


def advanced_averages(state: State, updated: Mapping[str, Tensor]) -> State:
    """The state after a step on the batch of ``updated``."""
    return {
        "gap_mean": updated["gap_mean"].item(),
        "gap_spread": updated["gap_spread"].item(),
        "num_batches": state["num_batches"] + 1.0,
    }
