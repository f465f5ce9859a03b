"""A tensor-parallel rank's part of a Megatron tensor: its shape, how its rows are merged from Hugging Face tensors and un-merged.

Shape letters: R rows of the whole Megatron tensor, C columns, tp tensor-parallel size, for what is an expert's the expert
tensor-parallel one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.checkpoint.hf.stacks import fill_from_stack, lines_of_stack
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.segments import rank_columns, rank_rows, segments_in, segments_of
from megatron_rmipo.families.tensors import ffn_channels, megatron_shape, stored_shapes


def rank_shape(rule: Rule, arch: ModelArchitecture, tp_size: int, padded_vocab_size: int) -> tuple[int, ...] | None:
    """Shape of the tensor on one rank, or None where ``tp_size`` does not divide what it cuts."""
    rows, *columns = megatron_shape(rule, arch)
    match rule.layout:
        case Layout.WHOLE | Layout.HEAD | Layout.EXPERTS | Layout.GATE:
            return (rows, *columns)
        case Layout.HEAD_COLUMNS | Layout.FFN_COLUMNS:
            return None if columns[0] % tp_size else (rows, columns[0] // tp_size)
        case Layout.VOCABULARY:
            return None if padded_vocab_size % tp_size else (padded_vocab_size // tp_size, *columns)
        case Layout.HEAD_ROWS:
            return None if arch.num_attention_heads % tp_size else (rows // tp_size, *columns)
        case Layout.QKV:
            # Above their number, ranks share the rows of a key/value head as they come.
            whole_heads = arch.num_query_groups % tp_size == 0 or tp_size % arch.num_query_groups == 0
            return (rows // tp_size, *columns) if whole_heads and rows % tp_size == 0 else None
        case Layout.HEADS:
            return None if arch.num_attention_heads % tp_size else (rows // tp_size, *columns)
        case Layout.QUERIES | Layout.KEYS:
            return None if arch.num_query_groups % tp_size else (rows // tp_size, *columns)
        case Layout.GATE_UP | Layout.GATE_UP_IN_TURNS:
            return None if ffn_channels(rule, arch) % tp_size else (rows // tp_size, *columns)


def fill_rows(
    rows: Tensor,
    files: WeightFiles,
    rule: Rule,
    place: Place,
    arch: ModelArchitecture,
    start: int,
    columns: slice = slice(None),
) -> int:
    """Fill ``rows`` with those of a Megatron tensor from row ``start`` on, read from the Hugging Face tensors they come from.

    Returns:
        How many were filled; those beyond the tensor, which are vocabulary padding, were left as they are.
    """
    names, shapes = rule.source_names(place), stored_shapes(rule, arch)
    stored = [files.expect(name, shape) for name, shape in zip(names, shapes, strict=True)]
    segments = segments_in(segments_of(rule, arch), start, start + rows.shape[0])
    if rule.is_stacked:
        fill_from_stack(rows, files, rule, place, segments, columns)
        return rows.shape[0]
    position = 0
    for segment in segments:
        source = stored[segment.source]
        for low, high in row_pieces(source.shape, source.dtype, segment.start, segment.start + segment.rows):
            files.read(names[segment.source], low, rows[position : position + high - low], columns)
            position += high - low
    return position


def fill_shard(
    shard: Tensor, files: WeightFiles, rule: Rule, place: Place, arch: ModelArchitecture, tp_rank: int, tp_size: int
) -> None:
    """Fill a rank's tensor from a Hugging Face checkpoint, reading only its part. Vocabulary padding becomes zeros."""
    num_rows = shard.shape[0] * tp_size if rule.is_cut and not rule.cuts_columns else shard.shape[0]
    columns = rank_columns(rule, megatron_shape(rule, arch)[-1], tp_rank, tp_size)
    position = 0
    with torch.no_grad():
        for start, stop in rank_rows(rule, num_rows, tp_rank, tp_size):
            position += fill_rows(shard[position : position + stop - start], files, rule, place, arch, start, columns)
        shard[position:].zero_()


def join_shards(shards: Sequence[Tensor], rule: Rule) -> Tensor:
    """The whole Megatron tensor from every tensor-parallel rank's part, in rank order."""
    if len(shards) == 1 or not rule.is_cut:
        return shards[0]
    if rule.cuts_columns:
        return torch.cat(list(shards), dim=1)
    num_rows = sum(shard.shape[0] for shard in shards)
    whole = shards[0].new_empty((num_rows, *shards[0].shape[1:]))
    for tp_rank, shard in enumerate(shards):
        position = 0
        for start, stop in rank_rows(rule, num_rows, tp_rank, len(shards)):
            whole[start:stop] = shard[position : position + stop - start]
            position += stop - start
    return whole


def source_rows(
    rule: Rule, arch: ModelArchitecture, source: int, dtype: torch.dtype, read: Callable[[int, int], Tensor]
) -> Iterator[Tensor]:
    """A Hugging Face tensor, piece by piece from its first row to its last, out of the Megatron tensor that holds it.

    Of a tensor of all experts it is what that holds of one.

    Args:
        rule: the Megatron tensor.
        arch: the model.
        source: number of the Hugging Face tensor among the rule's sources.
        dtype: dtype of the Megatron tensor, for the size of pieces.
        read: gives Megatron rows ``[start, stop)``.
    """
    if rule.is_stacked:
        yield from lines_of_stack(rule, arch, dtype, read)
        return
    columns = megatron_shape(rule, arch)[1:]
    found, position = [], 0
    for segment in segments_of(rule, arch):
        if segment.source == source:
            found.append((segment.start, position, segment.rows))
        position += segment.rows
    for _, first, rows in sorted(found):
        for low, high in row_pieces((rows, *columns), dtype):
            yield read(first + low, first + high)
