"""The two matrices that an adapter adds to a weight, of one linear layer or of all experts of a layer, and their sum with it.

Sums and roundings are those of PEFT's merge. Source: ``merge`` and ``get_delta_weight`` of ``peft.tuners.lora``.

Shape letters: R rows of a weight, C its columns, r the adapter's rank, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LowRankFactors:
    """What an adapter adds to a weight ``[R, C]``, or to each of the weights of E experts: ``scale`` times B A.

    Attributes:
        a: fp32 ``[r, C]``; of experts ``[E r, C]``, each expert's rows one after another.
        b: fp32 ``[R, r]``; of experts ``[R, r E]``, column ``k E + e`` being expert e's column k.
        rank: r.
        alpha: the scale times r, or times its root.
        scale: s.
        magnitude: fp32 ``[R]``, the length each row of the sum is given (DoRA); None: that which it has.
        num_experts: E; None where it is one weight's.
        is_rounded: whether what is added is rounded to the weight's dtype before it is, as PEFT does it where a parameter is
            adapted and no linear layer.
    """

    a: Tensor
    b: Tensor
    rank: int
    alpha: float
    scale: float
    magnitude: Tensor | None = None
    num_experts: int | None = None
    is_rounded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, or of each expert's."""
        return self.b.shape[0], self.a.shape[1]

    def of_expert(self, expert: int) -> LowRankFactors:
        """One expert's: a ``[r, C]`` and b ``[R, r]``, views of those of all."""
        assert self.num_experts is not None
        a = self.a.view(self.num_experts, self.rank, -1)[expert]
        b = self.b.view(-1, self.rank, self.num_experts)[:, :, expert]
        return dataclasses.replace(self, a=a, b=b, num_experts=None)

    def delta(self, start: int, stop: int, columns: slice = slice(None)) -> Tensor:
        """What is added to rows ``[start, stop)`` of the selected columns, fp32 ``[stop - start, C']``, before it is rounded.

        It is bit for bit what the product of the whole matrices holds there: they are multiplied alike whatever is left out, but
        for a product of one row or one column, which is computed another way, so that its neighbour is computed with it.
        """
        assert self.num_experts is None
        num_rows, num_columns = self.shape
        first, end, _ = columns.indices(num_columns)
        low, high = _at_least_two(start, stop, num_rows)
        left, right = _at_least_two(first, end, num_columns)
        product = self.b[low:high] @ self.a[:, left:right]
        return product[start - low : stop - low, first - left : end - left] * self.scale

    def merge(self, weight: Tensor, start: int, columns: slice = slice(None)) -> Tensor:
        """The sum of rows of a weight and what is added to them.

        Args:
            weight: rows from ``start`` on, on the CPU, ``[R', C']``; it may be overwritten.
            start: the first.
            columns: which it holds: all where there is a magnitude, which is given to whole rows.

        Returns:
            The same shape and dtype.
        """
        delta = self.delta(start, start + weight.shape[0], columns)
        if self.magnitude is None:
            return weight.add_(delta.to(weight.dtype) if self.is_rounded else delta)
        assert weight.shape[1] == self.a.shape[1]
        total = weight + delta
        lengths = torch.linalg.norm(total, dim=1)
        factors: Tensor = self.magnitude[start : start + weight.shape[0]] / lengths
        return (factors[:, None] * total).to(weight.dtype)


def stack_experts(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The two matrices of all experts, as :class:`LowRankFactors` has them, of each expert's a ``[r, C]`` and b ``[R, r]``."""
    a = torch.cat([a for a, _ in factors])
    return a, torch.stack([b for _, b in factors], dim=-1).flatten(1)


def _at_least_two(start: int, stop: int, size: int) -> tuple[int, int]:
    if stop - start > 1 or size < 2:
        return start, stop
    return (start, start + 2) if start + 2 <= size else (start - 1, start + 1)
