"""The hinge loss on DPO's rewards.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.metrics import likelihood_metrics
from megatron_rmipo.objectives.options import BETA_HELP, check_number


@dataclasses.dataclass(frozen=True)
class HingeConfig:
    """Options of ``hinge``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": BETA_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)


class Hinge(Objective):
    """``L = max(0, 1 - beta ((Lw - Rw) - (Ll - Rl)))``, ``L`` and ``R`` sums under the policy and the reference.

    Rewards: ``beta (L - R)``. A pair whose rewards differ by 1 or more gives no gradient.

    Source: loss type ``hinge`` of TRL's DPO, a form of SLiC with a reference (normalised by RSO, Liu et al. 2023).
    """

    name: ClassVar[str] = "hinge"
    Config: ClassVar[type] = HingeConfig
    config: HingeConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference."""
        return LogpNeeds(reference=True)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        beta = self.config.beta
        chosen, rejected = reference_log_ratios(logps)
        losses = torch.relu(1.0 - beta * (chosen - rejected))
        metrics = reward_metrics(beta * chosen, beta * rejected) | likelihood_metrics(logps)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
