"""APO-zero: each response on its own, for chosen responses that are better than the model's.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.log_ratios import LogRatioObjective


class ApoZero(LogRatioObjective):
    """``L = (1 - sigmoid(r_w)) + sigmoid(r_l)``, ``r = beta (L - R)``, ``L`` and ``R`` sums under the policy and the reference.

    The chosen response becomes more likely than under the reference, the rejected one less. Rewards: ``r``.

    Source: APO (D'Oosterlinck et al. 2024, arXiv 2408.06266), equation 7.
    """

    name: ClassVar[str] = "apo_zero"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) rounds to 1.
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
