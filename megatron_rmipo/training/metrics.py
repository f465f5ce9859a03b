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
        Name -> mean, and the percentiles; NaN where a pair's value is NaN.
    """
    summary = {}
    for name, values in pair_metrics.items():
        summary[name] = values.detach().to(torch.float64).mean().item()
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100.0
    for name in distributions:
        points = torch.quantile(pair_metrics[name].detach().cpu().to(torch.float64), shares)
        summary.update({f"{name}/p{percent}": point for percent, point in zip(PERCENTILES, points.tolist(), strict=True)})
    return summary
