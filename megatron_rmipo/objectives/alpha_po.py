"""AlphaPO: SimPO with a reward whose shape is a power of the probability.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics, smoothed_log_sigmoid_loss
from megatron_rmipo.objectives.bounded_exp import bounded_expm1
from megatron_rmipo.objectives.options import BETA_HELP, GAMMA_BETA_RATIO_HELP, check_number


@dataclasses.dataclass(frozen=True)
class AlphaPoConfig:
    """Options of ``alpha_po``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=2.5, metadata={"help": BETA_HELP})
    reward_alpha: float = dataclasses.field(
        default=0.25, metadata={"help": "shape of the reward (1 - p^-alpha) / alpha; 0: log p, which is simpo"}
    )
    gamma_beta_ratio: float = dataclasses.field(default=0.25, metadata={"help": GAMMA_BETA_RATIO_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("reward_alpha", self.reward_alpha)
        check_number("gamma_beta_ratio", self.gamma_beta_ratio, low=0.0)


class AlphaPo(Objective):
    """``L = -logsigmoid(beta (r_w - r_l) - gamma)``, ``r = (1 - p^-alpha) / alpha``, ``p = exp(bar L)``.

    ``bar L`` is the mean log-probability per token, ``alpha`` the option ``reward_alpha``, ``gamma = beta * gamma_beta_ratio``.
    ``alpha = 0`` is the limit ``r = bar L``, and so SimPO. ``p^-alpha`` leaves fp32 for very small ``p``: from ``exp(30)`` on it
    is continued by its tangent in ``bar L`` (at the default alpha below ``bar L = -120``), so that loss and gradient stay finite.
    Rewards: ``beta r``.

    Source: AlphaPO (Gupta et al. 2025); TRL calls the option ``alpha``.
    """

    name: ClassVar[str] = "alpha_po"
    Config: ClassVar[type] = AlphaPoConfig
    config: AlphaPoConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        beta, ratio = self.config.beta, self.config.gamma_beta_ratio
        chosen = self._shaped(logps.chosen_logps / logps.chosen_lengths)
        rejected = self._shaped(logps.rejected_logps / logps.rejected_lengths)
        losses = smoothed_log_sigmoid_loss(beta * (chosen - rejected - ratio), 0.0)
        metrics = reward_metrics(beta * chosen, beta * rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))

    def _shaped(self, log_probability: Tensor) -> Tensor:
        """``(1 - exp(-alpha x)) / alpha``, ``[P] -> [P]``."""
        alpha = self.config.reward_alpha
        if alpha == 0.0:
            return log_probability
        return -bounded_expm1(-alpha * log_probability) / alpha
