"""Exponentials that neither overflow nor lose their gradient: from an exponent of 30 on, their tangent there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(30) is 1e13: a gradient norm, which sums squares, stays far from the end of fp32's range.
MAX_EXPONENT = 30.0


def bounded_exp(exponent: Tensor) -> Tensor:
    """``exp(x)``, for ``x > 30`` its tangent ``exp(30) (1 + x - 30)``. Any shape, fp32, with gradient."""
    return _within(exponent).exp() + _beyond(exponent)


def bounded_expm1(exponent: Tensor) -> Tensor:
    """``exp(x) - 1``, without cancellation near 0; for ``x > 30`` its tangent. Any shape, fp32, with gradient."""
    return _within(exponent).expm1() + _beyond(exponent)


def _within(exponent: Tensor) -> Tensor:
    # Not clamp: whether it has a gradient at the bound itself depends on torch's version.
    return torch.where(exponent > MAX_EXPONENT, MAX_EXPONENT, exponent)


def _beyond(exponent: Tensor) -> Tensor:
    return math.exp(MAX_EXPONENT) * (exponent - MAX_EXPONENT).relu()
