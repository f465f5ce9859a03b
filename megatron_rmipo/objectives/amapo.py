"""AMaPO: SimPO's reward, with a margin for those pairs alone whose gap is below the usual one, the larger the further below.

Notation: ``bar Lw, bar Ll`` mean log p(y | x) per scored token of the chosen and rejected response, ``r = bar Lw - bar Ll``.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LossOutput, PairLogps
from megatron_rmipo.objectives.batch_margin import BatchMarginObjective
from megatron_rmipo.objectives.batch_statistics import MEAN_SPREAD_FLOOR, mean_and_spread, z_scores
from megatron_rmipo.objectives.bounded_exp import bounded_exp
from megatron_rmipo.objectives.options import BETA_HELP, LABEL_SMOOTHING_HELP, check_number

# In spreads: a pair that lies at the mean but for rounding gets no margin, at any parallel layout.
_AT_THE_MEAN = 1e-6


@dataclasses.dataclass(frozen=True)
class AmapoConfig:
    """Options of ``amapo``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=3.0, metadata={"help": BETA_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)


class Amapo(BatchMarginObjective):
    """``L = -logsigmoid(beta r - m)``, ``m = beta exp((mu - r) / sigma * mu)`` where ``r < mu``, else 0.

    ``mu`` and ``sigma`` are mean and unbiased standard deviation of ``r`` over the global batch; no gradient flows through ``m``.
    A spread below 0.001 nat counts as that much; where nothing spreads, as in a batch of one pair, no pair has a margin. From an
    exponent of 30 on the exponential is its tangent there.

    Rewards: ``beta * bar L``; the metric ``gamma`` is ``m``.

    Source: AMaPO (Deng et al. 2025, arXiv 2511.09385) as its released trainer computes it.
    """

    name: ClassVar[str] = "amapo"
    Config: ClassVar[type] = AmapoConfig
    config: AmapoConfig

    def margins(self, gaps: Tensor) -> Tensor:
        """``m`` of each pair, from the gaps of the global batch."""
        mean, spread = mean_and_spread(gaps)
        below = -z_scores(gaps, mean, spread, MEAN_SPREAD_FLOOR)
        return torch.where(below > _AT_THE_MEAN, self.config.beta * bounded_exp(below * mean), 0.0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        output = super().__call__(logps)
        margin = output.metrics["gamma"]
        return dataclasses.replace(output, metrics={**output.metrics, "amapo/below_mean": (margin > 0.0).to(margin.dtype)})
