"""SimPO: length-normalised rewards without a reference model, against one margin for all pairs.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics, smoothed_log_sigmoid_loss
from megatron_rmipo.objectives.options import check_number
from megatron_rmipo.objectives.sft import chosen_nll


@dataclasses.dataclass(frozen=True)
class SimpoConfig:
    """Options of ``simpo``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=2.0, metadata={"help": "scale of the reward"})
    gamma_beta_ratio: float = dataclasses.field(
        default=0.25, metadata={"help": "margin the average log-probabilities must differ by; gamma = beta * ratio"}
    )
    label_smoothing: float = dataclasses.field(
        default=0.0, metadata={"help": "assumed share of pairs labelled the wrong way round, 0 to 0.5"}
    )
    sft_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "weight of the token-mean negative log-likelihood of the chosen responses"}
    )

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("gamma_beta_ratio", self.gamma_beta_ratio, low=0.0)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_number("sft_weight", self.sft_weight, low=0.0)


class Simpo(Objective):
    """``L = -logsigmoid(beta (bar Lw - bar Ll) - gamma)``, ``bar L`` the mean log-probability per token.

    ``gamma = beta * gamma_beta_ratio``.

    Source: SimPO (Meng et al. 2024), equation 6; label smoothing and the SFT term as in its reference code.
    """

    name: ClassVar[str] = "simpo"
    Config: ClassVar[type] = SimpoConfig
    config: SimpoConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen_mean = logps.chosen_logps / logps.chosen_lengths
        rejected_mean = logps.rejected_logps / logps.rejected_lengths
        logits = config.beta * (chosen_mean - rejected_mean - config.gamma_beta_ratio)
        losses = smoothed_log_sigmoid_loss(logits, config.label_smoothing)
        nll = chosen_nll(logps)
        if config.sft_weight > 0.0:
            losses = losses + config.sft_weight * nll
        metrics = reward_metrics(config.beta * chosen_mean, config.beta * rejected_mean)
        metrics["logps/chosen"] = chosen_mean.detach()
        metrics["logps/rejected"] = rejected_mean.detach()
        metrics["nll/chosen"] = nll.detach()
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
