"""Metrics that paired objectives have in common, besides the rewards.

Shape letter: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import PairLogps
from megatron_rmipo.objectives.sft import chosen_nll

# The names of :func:`likelihood_metrics`.
LIKELIHOOD_METRICS = ("logps/chosen", "logps/rejected", "nll/chosen")


@torch.no_grad()
def likelihood_metrics(logps: PairLogps) -> dict[str, Tensor]:
    """How likely the responses are, fp32 ``[P]`` each, detached.

    ``logps/chosen`` and ``logps/rejected``: mean log-probability per token of each response; ``nll/chosen``: its mean over the
    pairs of the global batch is the mean per chosen token.
    """
    return {
        "logps/chosen": logps.chosen_logps / logps.chosen_lengths,
        "logps/rejected": logps.rejected_logps / logps.rejected_lengths,
        "nll/chosen": chosen_nll(logps),
    }
