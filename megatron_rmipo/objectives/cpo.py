"""CPO: the logistic loss on log-probabilities without a reference, and likelihood of the chosen response.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics, smoothed_log_sigmoid_loss
from megatron_rmipo.objectives.options import BETA_HELP, LABEL_SMOOTHING_HELP, SFT_WEIGHT_HELP, check_number
from megatron_rmipo.objectives.sft import chosen_nll


@dataclasses.dataclass(frozen=True)
class CpoConfig:
    """Options of ``cpo``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": BETA_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})
    sft_weight: float = dataclasses.field(default=1.0, metadata={"help": SFT_WEIGHT_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_number("sft_weight", self.sft_weight, low=0.0)


class Cpo(Objective):
    """``L = -logsigmoid(beta (Lw - Ll)) + sft_weight NLL``, ``L`` sums over the scored tokens.

    ``NLL`` is the mean per chosen token of the global batch; ``sft_weight`` is what TRL calls ``cpo_alpha``. Rewards: ``beta L``.

    Source: CPO (Xu et al. 2024); label smoothing and the token mean as in its reference code, whose mean is per
    micro-batch.
    """

    name: ClassVar[str] = "cpo"
    Config: ClassVar[type] = CpoConfig
    config: CpoConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen_rewards, rejected_rewards = config.beta * logps.chosen_logps, config.beta * logps.rejected_logps
        losses = smoothed_log_sigmoid_loss(chosen_rewards - rejected_rewards, config.label_smoothing)
        if config.sft_weight > 0.0:
            losses = losses + config.sft_weight * chosen_nll(logps)
        metrics = reward_metrics(chosen_rewards, rejected_rewards)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
