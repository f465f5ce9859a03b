"""Matrix products whose sums are kept in fp32 (fp64 for fp64), whatever the dtype of what is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32; fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` of one dtype; the result in fp32 (fp64 for fp64), in ``out`` where given."""
    dtype = accumulation_dtype(left.dtype)
    if left.dtype == dtype:
        return torch.mm(left, right, out=out)
    # bf16 sums that are not rounded to bf16 on the way. The CPU has no such kernel.
    result = torch.mm(left, right, out_dtype=dtype) if left.is_cuda else left @ right
    return result.to(dtype) if out is None else out.copy_(result)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without a temporary where the dtypes are the same."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(product(left, right))
