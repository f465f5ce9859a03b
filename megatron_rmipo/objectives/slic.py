"""SLiC: a hinge on the log-probabilities of a pair, and likelihood of the chosen response.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.options import check_number


@dataclasses.dataclass(frozen=True)
class SlicConfig:
    """Options of ``slic``.

    Raises:
        ValueError: an option is outside its range.
    """

    delta: float = dataclasses.field(
        default=1.0, metadata={"help": "margin the log-probabilities of the two responses, sums over tokens, must differ by"}
    )
    slic_lambda: float = dataclasses.field(
        default=0.1,
        metadata={"help": "weight of the negative log-likelihood of the chosen response, a sum over its tokens"},
    )

    def __post_init__(self) -> None:
        check_number("delta", self.delta, low=0.0)
        check_number("slic_lambda", self.slic_lambda, low=0.0)


class Slic(Objective):
    """``L = max(0, delta - Lw + Ll) - lambda Lw``, ``L`` sums over the scored tokens.

    The second term is a sum per response as the paper has it, not the token mean that ``sft_weight`` weighs elsewhere: long
    responses count more. Rewards: ``L``.

    Source: SLiC-HF (Zhao et al. 2023), with the chosen response as the target of the second term.
    """

    name: ClassVar[str] = "slic"
    Config: ClassVar[type] = SlicConfig
    config: SlicConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen, rejected = logps.chosen_logps, logps.rejected_logps
        losses = torch.relu(self.config.delta - chosen + rejected) - self.config.slic_lambda * chosen
        metrics = reward_metrics(chosen, rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
