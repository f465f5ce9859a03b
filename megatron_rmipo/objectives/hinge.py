"""The hinge loss on DPO's rewards.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.log_ratios import LogRatioObjective


class Hinge(LogRatioObjective):
    """``L = max(0, 1 - beta ((Lw - Rw) - (Ll - Rl)))``, ``L`` and ``R`` sums under the policy and the reference.

    Rewards: ``beta (L - R)``. A pair whose rewards differ by 1 or more gives no gradient.

    Source: loss type ``hinge`` of TRL's DPO, a form of SLiC with a reference (normalised by RSO, Liu et al. 2023).
    """

    name: ClassVar[str] = "hinge"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        return torch.relu(1.0 - (chosen - rejected))
