"""Metrics per pair to the numbers that are shown.

Shape letter: P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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
    known = {name: _known(values) if name != "loss" else values.to(torch.float64) for name, values in pair_metrics.items()}
    for name, values in known.items():
        if values.numel():
            summary[name] = values.mean().item()
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100.0
    for name in distributions:
        if known[name].numel():
            points = torch.quantile(known[name], shares).tolist()
            summary.update({f"{name}/p{percent}": point for percent, point in zip(PERCENTILES, points, strict=True)})
    return summary


def _known(values: Tensor) -> Tensor:
    wide = values.detach().cpu().to(torch.float64)
    return wide[~wide.isnan()]
