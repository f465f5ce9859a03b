"""The adapter of one Megatron linear layer: what it adds to the output, exactly, at any tensor-parallel size.

``W x`` becomes ``W x + s B A x`` for each projection in the matrix; with DoRA each row of ``W + s B A`` is given a trained
length. Of a column-parallel layer B is cut with the weight's rows and A is whole on every rank, of a row-parallel one A is cut
with its columns and B is whole; what crosses ranks is ``A x``, of the rank's width.

Sources: LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353, equation 5, the length's divisor without gradient as in section 4.3).

Shape letters: T tokens of the row (of this rank's part, under sequence parallelism), R rows of this rank's part of the weight, C
its columns, r ranks of the adapter, of all projections together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_rmipo.model.lora.projections import Projection

# Rows of a weight that are looked at in fp32 at a time.
_ROWS_AT_A_TIME = 2048

Cut = Literal["columns of the output", "columns of the input", "nothing"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """How a Megatron linear layer is computed.

    Attributes:
        cut: what tensor parallelism cuts: columns of the output (column-parallel), of the input (row-parallel), or nothing.
        group: of the ranks that hold its parts.
        sequence_parallel: tokens are dealt over the group where the layer's channels are not.
        in_expert: it is one expert's; what its group has to exchange, the dispatcher of tokens does.
        is_shared: other experts have the same adapter, and its gradients are summed with those of what is no expert's.
    """

    cut: Cut
    group: dist.ProcessGroup
    sequence_parallel: bool
    in_expert: bool
    is_shared: bool = False


class Factor(Module):
    """A trained tensor of an adapter, which keeps its digits when the model is made one of fewer.

    Args:
        tensor: its values.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = Parameter(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        def apply(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            keeps = torch.promote_types(changed.dtype, tensor.dtype) == changed.dtype
            return changed if keeps else tensor.to(changed.device)

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


class Part(Module):
    """The adapter of one projection.

    Args:
        projection: whose.
        linear_in: A, ``[r, C]``.
        linear_out: B, ``[rows held, r]``.
        magnitude: lengths of the rows held, or None without DoRA.
    """

    def __init__(self, projection: Projection, linear_in: Tensor, linear_out: Tensor, magnitude: Tensor | None) -> None:
        super().__init__()
        self.projection = projection
        self.linear_in, self.linear_out = Factor(linear_in), Factor(linear_out)
        self.magnitude = None if magnitude is None else Factor(magnitude)
        self._places = _numbers(projection.places)
        self._picked = None if projection.picked is None else _numbers(projection.picked)

    @property
    def places(self) -> Tensor:
        """int64: rows of the layer's output, of this rank's part, on the device of the adapter."""
        device = self.linear_out.weight.device
        if self._places.device != device:
            self._places = self._places.to(device)
        return self._places

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all rows of B, of which it uses some."""
        return self._picked is not None

    def held(self, factor: Factor, group: dist.ProcessGroup) -> Tensor:
        """Of B, or of the lengths, what stands in this rank's output."""
        if self._picked is None:
            return factor.weight
        # Ranks use different rows of what they all hold, so its gradient is a sum over them.
        whole: Tensor = copy_to_tensor_model_parallel_region(factor.weight, group=group)
        return whole[self._picked.to(whole.device)]

    def set_held(self, factor: Factor, values: Tensor, group: dist.ProcessGroup) -> None:
        """Of lengths, the values that stand in this rank's output, where all ranks of the group set theirs."""
        if self._picked is None:
            factor.weight.copy_(values)
            return
        factor.weight.zero_()
        factor.weight[self._picked.to(values.device)] = values
        dist.all_reduce(factor.weight.data, group=group)


class LowRank(Module):
    """The adapter of a linear layer.

    Args:
        linear: how the layer is computed.
        num_rows: R.
        parts: of its projections, in the order of the layer's output.
        trains: False for one that stays as it is.

    Attributes:
        key: what checkpoints call it; its tensors' names follow.
        is_registered: whether a layer has it as its child; of an adapter that several share the first one has.
    """

    key = ""
    is_registered = False

    def __init__(self, linear: Linear, num_rows: int, parts: Sequence[Part], *, trains: bool = True) -> None:
        super().__init__()
        self.linear, self.num_rows, self.parts = linear, num_rows, tuple(parts)
        for part in parts:
            if part.projection.part is not None:
                self.add_module(f"adapter_{part.projection.part}", part)
            else:
                for name, module in part.named_children():
                    self.add_module(name, module)
        self._mark(trains)

    @property
    def has_lengths(self) -> bool:
        """Whether it is DoRA's."""
        return self.parts[0].magnitude is not None

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, ``[T, .., R]`` of input ``[T, .., C]``, in the input's dtype.

        Every rank of the layer's group calls it together.
        """
        added: Tensor = F.linear(self._narrow(x), self._rows(x.dtype))
        return added

    def adapt(self, x: Tensor, output: Tensor, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor:
        """The layer's output with the adapter. Every rank of its group calls it together.

        Args:
            x: input of the weight.
            output: of the layer.
            bias: what the output has of it; None for none.
            weight: gives the frozen weight, ``[R, C]``.
        """
        added: Tensor = self(x)
        if not self.has_lengths:
            return output + added
        factors = self._length_factors(weight()).to(output.dtype)
        plain = output if bias is None else output - bias
        return output + (factors - 1) * plain + factors * added

    def delta(self, dtype: torch.dtype) -> Tensor:
        """``[R, C]``: what is added to this rank's part of the weight, with DoRA before rows get their length."""
        return self._rows(dtype) @ self._columns(dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the adapter in it, computed in the adapter's dtype. Every rank of its group calls it together."""
        dtype = self._dtype
        changed = weight.to(dtype) + self.delta(dtype)
        if self.has_lengths:
            changed *= self._length_factors(weight)[:, None]
        return changed.to(weight.dtype)

    @torch.no_grad()
    def row_lengths(self, weight: Tensor) -> Tensor:
        """``[R]``: lengths of the rows of ``W + s B A``, over all columns. Every rank of the layer's group calls it together."""
        dtype = self._dtype
        rows, columns = self._rows(dtype), self._columns(dtype)
        squares = [
            (weight[low : low + _ROWS_AT_A_TIME].to(dtype) + rows[low : low + _ROWS_AT_A_TIME] @ columns).square().sum(dim=1)
            for low in range(0, self.num_rows, _ROWS_AT_A_TIME)
        ]
        lengths = torch.cat(squares)
        if self.linear.cut == "columns of the input":
            dist.all_reduce(lengths, group=self.linear.group)
        return lengths.sqrt()

    @torch.no_grad()
    def set_lengths(self, lengths: Tensor) -> None:
        """Have the trained lengths be ``lengths [R]`` of this rank's rows. Every rank of the layer's group calls it together."""
        for part in self.parts:
            assert part.magnitude is not None
            part.set_held(part.magnitude, lengths[part.places], self.linear.group)

    @property
    def _dtype(self) -> torch.dtype:
        return self.parts[0].linear_in.weight.dtype

    def _narrow(self, x: Tensor) -> Tensor:
        """``[T, .., r]``: A x, whole sums of all tokens that the layer's output is of."""
        linear, narrow = self.linear, F.linear(x, self._columns(x.dtype))
        if linear.in_expert:
            return narrow
        group: dict[str, Any] = {"group": linear.group}
        whole: Tensor
        if linear.cut == "columns of the output":
            if linear.sequence_parallel:
                whole = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, **group)
            else:
                whole = copy_to_tensor_model_parallel_region(narrow, **group)
            return whole
        if linear.cut == "columns of the input":
            if linear.sequence_parallel:
                whole = reduce_scatter_to_sequence_parallel_region(narrow, **group)
            else:
                whole = reduce_from_tensor_model_parallel_region(narrow, **group)
            return whole
        return narrow

    def _columns(self, dtype: torch.dtype) -> Tensor:
        """``[r, C]``: the A of all projections, one below the other."""
        columns = torch.cat([part.linear_in.weight for part in self.parts])
        if self._sums_over_ranks("columns of the output"):
            columns = copy_to_tensor_model_parallel_region(columns, group=self.linear.group)
        return columns.to(dtype)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """``[R, r]``: the scaled B of all projections, each where its rows and its ranks are, zero elsewhere."""
        blocks = []
        for part in self.parts:
            held = part.held(part.linear_out, self.linear.group)
            if self._sums_over_ranks("columns of the input"):
                held = copy_to_tensor_model_parallel_region(held, group=self.linear.group)
            held = held * part.projection.low_rank.scale
            is_all = part.places.numel() == self.num_rows and len(part.projection.places) == 1
            blocks.append(held if is_all else held.new_zeros(self.num_rows, held.shape[1]).index_copy(0, part.places, held))
        return torch.cat(blocks, dim=1).to(dtype)

    def _length_factors(self, weight: Tensor) -> Tensor:
        """``[R]``: trained length over own length of each row, 1 where there is no adapter."""
        lengths = self.row_lengths(weight)
        factors = torch.ones_like(lengths)
        for part in self.parts:
            assert part.magnitude is not None
            trained = part.held(part.magnitude, self.linear.group)
            factors = factors.index_copy(0, part.places, trained / lengths[part.places])
        return factors

    def _sums_over_ranks(self, cut: Cut) -> bool:
        """Whether a factor that is whole on every rank of an expert has a gradient that is a sum over them."""
        return self.linear.in_expert and self.linear.cut == cut and self.linear.group.size() > 1

    def _mark(self, trains: bool) -> None:
        """Tell Megatron how each tensor is held, for its sums of gradients and the norm of all of them."""
        linear = self.linear
        for part in self.parts:
            is_cut = {
                part.linear_in: linear.cut == "columns of the input",
                part.linear_out: linear.cut == "columns of the output" and not part.is_whole,
            }
            if part.magnitude is not None:
                is_cut[part.magnitude] = is_cut[part.linear_out]
            for factor, cut in is_cut.items():
                parameter: Any = factor.weight
                parameter.requires_grad_(trains)
                set_tensor_model_parallel_attributes(parameter, cut, 1 if factor is part.linear_in else 0, 1)
                parameter.is_adapter_output = factor is part.linear_out
                if linear.in_expert and not linear.is_shared:
                    parameter.allreduce = False
                elif linear.sequence_parallel and not cut and self._sees_part_of_tokens(factor, part):
                    # Each rank sees its part of the row, and Megatron sums the gradients over the group.
                    parameter.sequence_parallel = True

    def _sees_part_of_tokens(self, factor: Factor, part: Part) -> bool:
        """Under sequence parallelism: whether its gradient on a rank is that of the rank's tokens alone."""
        if self.linear.cut == "columns of the output":
            return factor is part.linear_in
        return True


def _numbers(runs: Sequence[tuple[int, int]]) -> Tensor:
    """int64: the numbers in the runs."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs]) if runs else torch.empty(0, dtype=torch.int64)
