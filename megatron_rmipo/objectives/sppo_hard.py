"""SPPO with hard labels: each log-ratio regressed onto its own constant.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from megatron_rmipo.objectives.log_ratios import LogRatioObjective


class SppoHard(LogRatioObjective):
    """``L = ((Lw - Rw) - 1 / (2 beta))^2 + ((Ll - Rl) + 1 / (2 beta))^2``, sums under the policy and the reference.

    The chosen response wins with probability 1 and the rejected one with 0, where the paper takes the estimates of a preference
    model. Rewards: ``beta (L - R)``, which the loss draws to 1/2 and -1/2.

    Source: SPPO (Wu et al. 2024, arXiv 2405.00675), equation 4.7 with hard probabilities, as TRL has it.
    """

    name: ClassVar[str] = "sppo_hard"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards."""
        beta = self.config.beta
        return ((chosen - 0.5) / beta).square() + ((rejected + 0.5) / beta).square()
