"""Metrics that every run has, whatever its objective returns.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps
from megatron_rmipo.objectives.contract import check_output
from megatron_rmipo.objectives.sft import chosen_nll


def output_of(objective: Objective, logps: PairLogps) -> LossOutput:
    """What an objective says of pairs, checked, with the :func:`likelihood_metrics` beside it.

    Whoever runs an objective calls it so. A metric that it gives under one of those names itself is its own.

    Raises:
        ConfigError: its losses or metrics are not one value per pair.
    """
    output = objective(logps)
    output = dataclasses.replace(output, metrics={**likelihood_metrics(logps, objective), **output.metrics})
    check_output(objective, output, logps.chosen_logps.shape[0])
    return output


@torch.no_grad()
def likelihood_metrics(logps: PairLogps, objective: Objective) -> dict[str, Tensor]:
    """How likely the responses are and how long, fp32 ``[P]`` each, detached; NaN where a row does not have the response.

    ``logps/chosen`` and ``logps/rejected``: mean log-probability per token of each response; ``nll/chosen``: its mean over the
    pairs of the global batch is the mean per chosen token (0 for a row without); ``tokens/chosen`` and ``tokens/rejected``:
    scored tokens. Nothing of rejected responses where the objective does not read them.
    """
    sides = {"chosen": (logps.chosen_logps, logps.chosen_lengths)}
    if objective.needs.rejected:
        sides["rejected"] = (logps.rejected_logps, logps.rejected_lengths)
    means = {f"logps/{side}": sums / lengths for side, (sums, lengths) in sides.items()}
    tokens = {f"tokens/{side}": lengths.masked_fill(lengths == 0, torch.nan) for side, (_, lengths) in sides.items()}
    return {**means, "nll/chosen": chosen_nll(logps), **tokens}
