"""DPO: rewards are log-ratios with a reference, compared by the logistic loss.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from megatron_rmipo.objectives.base import (
    LogpNeeds,
    LossOutput,
    Objective,
    PairLogps,
    reward_metrics,
    smoothed_log_sigmoid_loss,
)
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.metrics import likelihood_metrics
from megatron_rmipo.objectives.options import (
    BETA_HELP,
    LABEL_SMOOTHING_HELP,
    LOG_RATIO_NORMALIZATION_HELP,
    check_choice,
    check_number,
)


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Options of ``dpo``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": BETA_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})
    log_ratio_normalization: Literal["sum", "mean"] = dataclasses.field(
        default="sum", metadata={"help": LOG_RATIO_NORMALIZATION_HELP}
    )

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_choice("log_ratio_normalization", self.log_ratio_normalization, ("sum", "mean"))


class Dpo(Objective):
    """``L = -logsigmoid(beta ((Lw - Rw) - (Ll - Rl)))``, ``L`` and ``R`` sums under the policy and the reference.

    With ``log_ratio_normalization`` ``mean``, length-normalized DPO, each ``L - R`` is divided by the response's number of scored
    tokens. Rewards: ``beta (L - R)`` in the normalization chosen.

    Source: DPO (Rafailov et al. 2023), equation 7; label smoothing: its conservative form (Mitchell 2023).
    """

    name: ClassVar[str] = "dpo"
    Config: ClassVar[type] = DpoConfig
    config: DpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference."""
        return LogpNeeds(reference=True)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        beta = self.config.beta
        chosen, rejected = reference_log_ratios(logps, self.config.log_ratio_normalization)
        losses = smoothed_log_sigmoid_loss(beta * (chosen - rejected), self.config.label_smoothing)
        metrics = reward_metrics(beta * chosen, beta * rejected) | likelihood_metrics(logps)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
