"""APO-down: both responses become less likely, the rejected one more so, for a model that is better than either.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.log_ratios import LogRatioObjective


class ApoDown(LogRatioObjective):
    """``L = sigmoid(r_w) + (1 - sigmoid(r_w - r_l))``, ``r = beta (L - R)``, sums under the policy and the reference.

    The chosen response becomes less likely than under the reference, the rejected one by more. Rewards: ``r``.

    Source: APO (D'Oosterlinck et al. 2024, arXiv 2408.06266), equation 8.
    """

    name: ClassVar[str] = "apo_down"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) rounds to 1.
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
