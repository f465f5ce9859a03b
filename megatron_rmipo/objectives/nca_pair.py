"""NCA on pairs: absolute rewards, so that the chosen response keeps its likelihood.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rmipo.objectives.log_ratios import LogRatioObjective


class NcaPair(LogRatioObjective):
    """``L = -logsigmoid(r_w) - (logsigmoid(-r_w) + logsigmoid(-r_l)) / 2``, ``r = beta (L - R)``.

    ``L`` and ``R`` are sums under the policy and the reference. Rewards: ``r``.

    Source: NCA (Chen et al. 2024, arXiv 2402.05369), its form for pairs.
    """

    name: ClassVar[str] = "nca_pair"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))
