"""epsilon-DPO: DPO with a beta per pair, moved by whether the policy's preference grows with its distance from the reference.

Notation: ``Lw, Ll`` sum log p(y | x) of the chosen and rejected response, ``Rw, Rl`` the same under the reference,
``h = (Lw - Rw) - (Ll - Rl)``, ``f, r`` the logits of policy and reference.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import (
    BatchLogps,
    LogpNeeds,
    LossOutput,
    Objective,
    PairLogps,
    State,
    reward_metrics,
    smoothed_log_sigmoid_loss,
)
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.options import BETA_HELP, check_number


@dataclasses.dataclass(frozen=True)
class EpsilonDpoConfig:
    """Options of ``epsilon_dpo``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=0.01, metadata={"help": BETA_HELP})
    epsilon: float = dataclasses.field(
        default=0.01,
        metadata={"help": "how far the logits are moved off and towards the reference's, and beta with them; in (0, 1)"},
    )

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        # At 1 the largest beta of a pair, beta / (1 - epsilon), would be infinite.
        check_number("epsilon", self.epsilon, low=0.0, high=1.0, low_is_valid=False, high_is_valid=False)


class EpsilonDpo(Objective):
    """``L = -logsigmoid(beta / (1 + epsilon step) h)``, ``step`` -1, 0 or 1 per pair.

    With ``z = Lw - Ll``, ``z+`` the same under the logits moved off the reference, ``softmax((1 + epsilon) f - epsilon r)``, and
    ``z-`` under those moved towards it: ``step`` is 1 where ``z+ > z > z-``, -1 where ``z- > z > z+``, else 0. After an optimizer
    step ``beta`` becomes ``beta / (1 + epsilon mean(step))``, the mean over the global batch; this is the only state.

    Rewards are those of the pair's own beta; the metric ``beta`` is the one all pairs start from.

    Source: epsilon-DPO (Lee et al. 2025) as its released code computes it, where beta is at most ``beta / (1 - epsilon)``; its
    appendix has ``beta (1 + epsilon)``.
    """

    name: ClassVar[str] = "epsilon_dpo"
    Config: ClassVar[type] = EpsilonDpoConfig
    config: EpsilonDpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """A reference in memory, and each response under its logits mixed with the policy's."""
        return LogpNeeds(perturbation=self.config.epsilon)

    def initial_state(self) -> State:
        """``beta`` as it is before the first step."""
        return {"beta": float(self.config.beta)}

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``beta``, a float64 scalar; nothing of the batch is read."""
        return {"beta": torch.tensor(state["beta"], dtype=torch.float64)}

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """``beta`` after the step, from the mean of ``epsilon/step`` over the batch."""
        mean_step = metrics["epsilon/step"].double().mean().item()
        return {"beta": state["beta"] / (1.0 + self.config.epsilon * mean_step)}

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen_ratios, rejected_ratios = reference_log_ratios(logps)
        step = _steps(logps)
        base = logps.batch["beta"].to(step)
        beta = base / (1.0 + self.config.epsilon * step)
        losses = smoothed_log_sigmoid_loss(beta * (chosen_ratios - rejected_ratios), 0.0)
        metrics = reward_metrics(beta * chosen_ratios, beta * rejected_ratios)
        metrics["beta"] = base.expand_as(step).clone()
        metrics["epsilon/step"] = step
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))


def _steps(logps: PairLogps) -> Tensor:
    """1 where the preference grows with the distance from the reference, -1 where it shrinks, else 0; fp32 ``[P]``."""
    assert logps.extrapolated_chosen_logps is not None
    assert logps.extrapolated_rejected_logps is not None
    assert logps.interpolated_chosen_logps is not None
    assert logps.interpolated_rejected_logps is not None
    here = logps.chosen_logps - logps.rejected_logps
    off = logps.extrapolated_chosen_logps - logps.extrapolated_rejected_logps
    towards = logps.interpolated_chosen_logps - logps.interpolated_rejected_logps
    grows, shrinks = (off > here) & (here > towards), (towards > here) & (here > off)
    return grows.to(here.dtype) - shrinks.to(here.dtype)
