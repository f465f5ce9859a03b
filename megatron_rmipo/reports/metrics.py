"""Metrics per pair to the numbers that are shown.

Shape letter: P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.reports.held_out import errors_to_record

PERCENTILES = (5, 50, 95)


def summarize(pair_metrics: Mapping[str, Tensor], distributions: Iterable[str] = ()) -> dict[str, float]:
    """Means over the pairs, and percentiles of some.

    Computed in float64 from the pairs in the order of the global batch, so that every layout gives the same number to the bit.

    Args:
        pair_metrics: name -> ``[P]``, at least one pair.
        distributions: the names that also get ``name/p5``, ``name/p50`` and ``name/p95`` (linear interpolation).

    Returns:
        Name -> mean, and the percentiles, over the pairs that have a value (not NaN); a name that no pair has is left out. The
        loss of every pair counts: one that is not finite makes the mean so.
    """
    summary = {}
    known = _known_values(pair_metrics)
    for name, values in known.items():
        if values.numel():
            summary[name] = values.mean().item()
    for name in distributions:
        if known[name].numel():
            # Not torch.quantile, which takes no more than 16 million values.
            points = np.percentile(known[name].numpy(), PERCENTILES).tolist()
            summary.update({f"{name}/p{percent}": point for percent, point in zip(PERCENTILES, points, strict=True)})
    return summary


def summarize_held_out(pair_metrics: Mapping[str, Tensor], distributions: Iterable[str] = ()) -> dict[str, float | int]:
    """The same for an evaluation, with what its figures stand on: the number of pairs, and the standard error of each mean.

    A percentile has no error of its own: it stands on the same pairs.
    """
    known = {name: values.numpy() for name, values in _known_values(pair_metrics).items()}
    num_pairs = max(values.numel() for values in pair_metrics.values())
    return {**summarize(pair_metrics, distributions), **errors_to_record(known, num_pairs)}


def _known_values(pair_metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that there are, float64 on the CPU; a loss that is not a number is one of them."""
    wide = {name: values.detach().cpu().to(torch.float64) for name, values in pair_metrics.items()}
    return {name: values if name == "loss" else values[~values.isnan()] for name, values in wide.items()}
