"""gamma-PO: SimPO whose margin is dealt out over the pairs of a batch, more of it to those told apart clearly.

Notation: ``bar Lw, bar Ll`` mean log p(y | x) per scored token of the chosen and rejected response, ``n`` pairs of the global
batch, ``gap = beta (bar Lw - bar Ll)``.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.batch_margin import BatchMarginObjective
from megatron_rmipo.objectives.options import BETA_HELP, GAMMA_BETA_RATIO_HELP, LABEL_SMOOTHING_HELP, check_number

_MIRROR_STEPS = 20


@dataclasses.dataclass(frozen=True)
class GammaPoConfig:
    """Options of ``gamma_po``.

    Raises:
        ValueError: an option is outside its range.
    """

    beta: float = dataclasses.field(default=10.0, metadata={"help": BETA_HELP})
    gamma_beta_ratio: float = dataclasses.field(default=0.4, metadata={"help": GAMMA_BETA_RATIO_HELP})
    tau: float = dataclasses.field(
        default=10.0, metadata={"help": "how strongly the margins are held together; large: all alike"}
    )
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("gamma_beta_ratio", self.gamma_beta_ratio, low=0.0)
        if self.gamma_beta_ratio == 0.0:
            raise ValueError("gamma_beta_ratio 0 leaves no margin to deal out; use objective simpo")
        check_number("tau", self.tau, low=0.0, low_is_valid=False)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)


class GammaPo(BatchMarginObjective):
    """``L = -logsigmoid(gap - gamma_i)``, ``gamma_i = gamma n p_i``, ``gamma = beta * gamma_beta_ratio``.

    ``p``, without gradient, is a distribution over the pairs of the global batch: where 20 steps of mirror descent come to, of
    size ``min(0.5 / tau, 1)`` from the uniform one, in minimizing the mean of ``-logsigmoid(gap - gamma n p_i)`` plus
    ``tau KL(p || uniform)``. The mean margin of a batch is ``gamma``; at the minimum a pair's is the larger the larger its gap.

    Rewards: ``beta * bar L``; the metric ``gamma`` is ``gamma_i``.

    Source: gamma-PO (Sun et al. 2025, arXiv 2506.03690), its SimPO form. The released trainer has it over one batch, as here, and
    over a queue of gaps of earlier batches, of which it draws at random, for batches too small to tell what is usual.
    """

    name: ClassVar[str] = "gamma_po"
    Config: ClassVar[type] = GammaPoConfig
    config: GammaPoConfig

    def margins(self, gaps: Tensor) -> Tensor:
        """``gamma_i`` of each pair, from the gaps of the global batch."""
        config = self.config
        return dealt_margins(config.beta * gaps, config.beta * config.gamma_beta_ratio, config.tau)


def dealt_margins(gaps: Tensor, gamma: float, tau: float) -> Tensor:
    """Margins whose mean is ``gamma``, float64 ``[P]``.

    Args:
        gaps: reward gaps of the pairs, float64 ``[P]``.
        gamma: the mean margin.
        tau: weight of the divergence from equal margins.
    """
    # Of n p, whose mean is 1: as logarithms no share underflows.
    log_shares = torch.zeros_like(gaps)
    size = min(0.5 / tau, 1.0)
    for _ in range(_MIRROR_STEPS):
        slope = tau * (1.0 + log_shares) + gamma * torch.sigmoid(gamma * log_shares.exp() - gaps)
        log_shares = log_shares - size * slope
        log_shares = log_shares - (torch.logsumexp(log_shares, dim=0) - math.log(gaps.numel()))
    return gamma * log_shares.exp()
