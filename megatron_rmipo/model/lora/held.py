"""The tensors of this rank's adapters: which of a Hugging Face adapter's they are, and which part of them.

Shape letters: R rows of a projection, C its columns, r the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter

from megatron_rmipo.model.lora.attach import low_ranks
from megatron_rmipo.model.lora.low_rank import Factor, LowRank, Part
from megatron_rmipo.model.lora.projections import FactorKind, Projection, factor_name
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.packed_model import Chunks

# Where a stretch of a tensor's rows stands in the whole: offsets and sizes.
Box = tuple[tuple[int, ...], tuple[int, ...]]


class HeldFactor(NamedTuple):
    """What this rank holds of a factor of a projection's adapter.

    Attributes:
        full_name: in the chunk.
        key: what checkpoints call it; that of an expert is the same for all of the layer.
        kind: A ``[r, C]``, B ``[R, r]``, or the lengths of rows ``[R]``.
        projection: whose.
        parameter: itself; its rows are those of the boxes, one after the other.
        shape: of the whole factor.
        boxes: where in the whole it stands.
        is_cut: whether each rank of the layer's group holds a part of its own; else all hold the same.
        in_expert: whether that group is the expert tensor-parallel one.
    """

    full_name: str
    key: str
    kind: FactorKind
    projection: Projection
    parameter: Parameter
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    is_cut: bool
    in_expert: bool

    @property
    def stretches(self) -> Iterator[tuple[Box, Tensor]]:
        """The boxes with the rows of the parameter that each of them is."""
        first = 0
        for box in self.boxes:
            count = box[1][0]
            yield box, self.parameter.detach()[first : first + count]
            first += count


def held_factors(model: Chunks, name: str = ADAPTER) -> Iterator[HeldFactor]:
    """The factors of an adapter that this rank holds, chunk by chunk.

    Args:
        model: this rank's part of an adapted model, or its chunks.
        name: of the adapter.
    """
    for full_name, _, adapter in low_ranks(model, name):
        yield from held_of(adapter, full_name)


def held_of(adapter: LowRank, full_name: str) -> Iterator[HeldFactor]:
    """The factors that this rank holds of one layer's adapter, which has this name in its chunk."""
    for part in adapter.parts:
        for kind, factor in _factors(part).items():
            own = factor_name(part.projection.part, kind)
            yield _held(adapter, part, kind, factor, full_name + own, adapter.key + own)


def _factors(part: Part) -> dict[FactorKind, Factor]:
    found: dict[FactorKind, Factor] = {"A": part.linear_in, "B": part.linear_out}
    return found if part.magnitude is None else {**found, "magnitude": part.magnitude}


def _held(adapter: LowRank, part: Part, kind: FactorKind, factor: Factor, full_name: str, key: str) -> HeldFactor:
    projection, linear = part.projection, adapter.linear
    (num_rows, num_columns), rank = projection.shape, projection.low_rank.rank
    boxes: tuple[Box, ...]
    if kind == "A":
        first, last, _ = projection.columns.indices(num_columns)
        shape: tuple[int, ...] = (rank, num_columns)
        boxes = (((0, first), (rank, last - first)),)
        is_cut = linear.cut == "columns of the input"
    else:
        width = (rank,) if kind == "B" else ()
        shape = (num_rows, *width)
        boxes = tuple(((start, *(0 for _ in width)), (stop - start, *width)) for start, stop in projection.rows)
        is_cut = linear.cut == "columns of the output" and not part.is_whole
    return HeldFactor(
        full_name, key, kind, projection, factor.weight, shape, boxes, is_cut, linear.in_expert and not linear.is_shared
    )
