"""Tensors that hold a matrix, or a bias, of every expert of a layer: what is one expert's, read and written.

The matrices are transposed against Megatron's, so pieces of one are runs of the other's columns: a whole matrix of an expert is
in memory, once, where others are read and written by runs of rows.

Shape letters: E experts of a layer, R rows of an expert's Megatron tensor, C its columns (1 of a bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place, Rule
from megatron_rmipo.families.segments import Segment, segments_of
from megatron_rmipo.families.tensors import megatron_shape


def fill_from_stack(
    rows: Tensor, files: WeightFiles, rule: Rule, place: Place, segments: Iterable[Segment], columns: slice
) -> None:
    """Fill rows of an expert's Megatron tensor, ``[R', C']`` or ``[R']``, from the stack ``[E, C, R]`` or ``[E, R]``.

    Args:
        rows: of any dtype and device.
        files: hold the stack.
        rule: the Megatron tensor.
        place: says which expert.
        segments: the rows, as runs of those of the transposed matrix.
        columns: which of them.
    """
    (name,) = rule.source_names(place)
    stored, target = files.tensors[name], rows if rows.dim() == 2 else rows[:, None]
    num_columns, num_rows = (1, *stored.shape[1:])[-2:]
    assert place.expert is not None
    first = columns.start or 0
    for low, high in row_pieces((num_columns, num_rows), stored.dtype, first, first + target.shape[1]):
        piece = torch.empty((high - low, num_rows), dtype=torch.promote_types(stored.dtype, rows.dtype))
        files.read_lines(name, place.expert * num_columns + low, piece)
        position = 0
        for segment in segments:
            part = target[position : position + segment.rows, low - first : high - first]
            part.copy_(piece[:, segment.places].T)
            position += segment.rows


def lines_of_stack(
    rule: Rule, arch: ModelArchitecture, dtype: torch.dtype, read: Callable[[int, int], Tensor]
) -> Iterator[Tensor]:
    """What a stack holds of one expert, ``[C, R]`` or ``[R]`` piece by piece, out of the expert's Megatron tensor.

    Args:
        rule: the Megatron tensor.
        arch: the model.
        dtype: of the Megatron tensor, for the size of pieces.
        read: gives Megatron rows ``[start, stop)``.
    """
    num_rows, *columns = megatron_shape(rule, arch)
    order, position = torch.empty(num_rows, dtype=torch.int64), 0
    for segment in segments_of(rule, arch):
        order[segment.places] = torch.arange(position, position + segment.rows)
        position += segment.rows
    whole = read(0, num_rows)
    order = order.to(whole.device)
    if rule.is_bias:
        yield whole[order]
        return
    for low, high in row_pieces((*columns, num_rows), dtype):
        yield whole[:, low:high].T[:, order]
