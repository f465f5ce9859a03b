"""Robust DPO: the logistic loss without the bias that wrong labels give it.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rmipo.objectives.log_ratios import BetaConfig, LogRatioObjective
from megatron_rmipo.objectives.options import LABEL_SMOOTHING_HELP, check_number


@dataclasses.dataclass(frozen=True)
class RobustConfig(BetaConfig):
    """Options of ``robust``.

    Raises:
        ValueError: an option is outside its range.
    """

    label_smoothing: float = dataclasses.field(default=0.1, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        # The estimate divides by 1 - 2 e.
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5, high_is_valid=False)
        if self.label_smoothing == 0.0:
            raise ValueError("label_smoothing 0 leaves robust nothing to correct; use objective dpo")


class Robust(LogRatioObjective):
    """``L = (-(1 - e) logsigmoid(z) + e logsigmoid(-z)) / (1 - 2 e)``, ``z = beta ((Lw - Rw) - (Ll - Rl))``.

    ``e`` is the option ``label_smoothing``; ``L`` and ``R`` are sums under the policy and the reference. Over pairs of which a
    share ``e`` is labelled the wrong way round, its mean is that of DPO's loss with the right labels. Rewards: ``beta (L - R)``.

    Source: robust DPO (Chowdhury et al. 2024, arXiv 2403.00409).
    """

    name: ClassVar[str] = "robust"
    Config: ClassVar[type] = RobustConfig
    config: RobustConfig

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        margins, flipped = chosen - rejected, self.config.label_smoothing
        # The formula with logsigmoid(-z) = logsigmoid(z) - z put in: no difference of two large numbers.
        return -logsigmoid(margins) - flipped / (1.0 - 2.0 * flipped) * margins
