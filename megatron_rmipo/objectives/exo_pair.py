"""EXO on pairs: the reverse KL divergence from smoothed labels.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rmipo.objectives.log_ratios import BetaConfig, LogRatioObjective
from megatron_rmipo.objectives.options import LABEL_SMOOTHING_HELP, check_number


@dataclasses.dataclass(frozen=True)
class ExoPairConfig(BetaConfig):
    """Options of ``exo_pair``.

    Raises:
        ValueError: an option is outside its range.
    """

    label_smoothing: float = dataclasses.field(default=1e-3, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Without any the divergence from the labels is infinite.
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5, low_is_valid=False)


class ExoPair(LogRatioObjective):
    """``L = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)``, ``q = sigmoid(beta ((Lw - Rw) - (Ll - Rl)))``.

    The KL divergence of the policy's preference ``(q, 1 - q)`` from the labels ``(1 - e, e)``, ``e`` the option
    ``label_smoothing``; ``L`` and ``R`` are sums under the policy and the reference. It is 0 where ``q = 1 - e``. Rewards:
    ``beta (L - R)``.

    Source: EXO (Ji et al. 2024, arXiv 2402.00856), equation 16.
    """

    name: ClassVar[str] = "exo_pair"
    Config: ClassVar[type] = ExoPairConfig
    config: ExoPairConfig

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        margins, flipped = chosen - rejected, self.config.label_smoothing
        right = torch.sigmoid(margins) * (logsigmoid(margins) - math.log1p(-flipped))
        return right + torch.sigmoid(-margins) * (logsigmoid(-margins) - math.log(flipped))
