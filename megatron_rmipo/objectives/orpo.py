"""ORPO: supervised fine-tuning with a penalty on the odds of the rejected response.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.options import check_number
from megatron_rmipo.objectives.sft import chosen_nll

# About what fp32 resolves of a token's log-probability, a difference of logits: nearer to 1 a probability is not known.
NEAREST_TO_CERTAIN = 1e-6


@dataclasses.dataclass(frozen=True)
class OrpoConfig:
    """Options of ``orpo``.

    Raises:
        ValueError: an option is outside its range.
    """

    orpo_lambda: float = dataclasses.field(default=0.1, metadata={"help": "weight of the odds-ratio term; TRL calls it beta"})

    def __post_init__(self) -> None:
        check_number("orpo_lambda", self.orpo_lambda, low=0.0, low_is_valid=False)


class Orpo(Objective):
    """``L = NLL - lambda logsigmoid(log odds_w - log odds_l)``, ``odds = p / (1 - p)``, ``p = exp(bar L)``.

    ``bar L`` is the mean log-probability per token, ``NLL`` the mean per chosen token of the global batch, ``lambda`` the option
    ``orpo_lambda``. A ``bar L`` above -1e-6, even above 0 by rounding, has the odds of -1e-6 and their slope: a response of which
    every token is certain has finite odds and, if rejected, is pushed down all the same. Rewards: ``lambda bar L``, as TRL logs.

    Source: ORPO (Hong et al. 2024).
    """

    name: ClassVar[str] = "orpo"
    Config: ClassVar[type] = OrpoConfig
    config: OrpoConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        weight = self.config.orpo_lambda
        chosen, rejected = logps.chosen_logps / logps.chosen_lengths, logps.rejected_logps / logps.rejected_lengths
        penalty = -torch.nn.functional.logsigmoid(log_odds(chosen) - log_odds(rejected))
        losses = chosen_nll(logps) + weight * penalty
        metrics = reward_metrics(weight * chosen, weight * rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))


def log_odds(log_probability: Tensor) -> Tensor:
    """``x - log(1 - exp(x))`` of ``x <= -1e-6``, fp32 of any shape; above, value and slope at -1e-6."""
    # Subtracting a detached excess keeps the slope, where a clamp would leave none.
    x = log_probability - (log_probability.detach() + NEAREST_TO_CERTAIN).relu()
    return x - (-torch.expm1(x)).log()
