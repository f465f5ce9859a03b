"""IPO: the difference of the log-ratios regressed onto a constant.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.options import LOG_RATIO_NORMALIZATION_HELP, check_choice, check_number


@dataclasses.dataclass(frozen=True)
class IpoConfig:
    """Options of ``ipo``.

    Raises:
        ValueError: an option is outside its range.
    """

    tau: float = dataclasses.field(
        default=0.1, metadata={"help": "the log-ratios of a pair are to differ by 1 / (2 tau); TRL calls it beta"}
    )
    log_ratio_normalization: Literal["sum", "mean"] = dataclasses.field(
        default="sum", metadata={"help": LOG_RATIO_NORMALIZATION_HELP}
    )

    def __post_init__(self) -> None:
        check_number("tau", self.tau, low=0.0, low_is_valid=False)
        check_choice("log_ratio_normalization", self.log_ratio_normalization, ("sum", "mean"))


class Ipo(Objective):
    """``L = ((Lw - Rw) - (Ll - Rl) - 1 / (2 tau))^2``, ``L`` and ``R`` sums under the policy and the reference.

    With ``log_ratio_normalization`` ``mean`` each ``L - R`` is divided by the response's number of scored tokens.

    Rewards: ``tau (L - R)`` in the normalization chosen: the loss draws their difference to 1/2.

    Source: IPO (Azar et al. 2024), equation 17; ``mean``: TRL and HALOs, which its authors confirmed.
    """

    name: ClassVar[str] = "ipo"
    Config: ClassVar[type] = IpoConfig
    config: IpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference."""
        return LogpNeeds(reference=True)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        tau = self.config.tau
        chosen, rejected = reference_log_ratios(logps, self.config.log_ratio_normalization)
        losses = (chosen - rejected - 1.0 / (2.0 * tau)).square()
        metrics = reward_metrics(tau * chosen, tau * rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
