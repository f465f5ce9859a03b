"""The rows of a Megatron tensor as runs of rows of its Hugging Face sources, and which of them a tensor-parallel rank holds.

That one description serves every direction and every layout: a tensor-parallel slice, a streamed piece, merging and un-merging.

Shape letters: R rows of the whole Megatron tensor, tp tensor-parallel size, of an expert's the expert tensor-parallel one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.tensors import source_shapes


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of source number ``source`` from ``start`` on, every ``step``-th, at this place of the Megatron tensor."""

    source: int
    start: int
    rows: int
    step: int = 1

    @property
    def places(self) -> slice:
        """The rows of the source."""
        return slice(self.start, self.start + self.rows * self.step, self.step)


def segments_of(rule: Rule, arch: ModelArchitecture) -> list[Segment]:
    """The rows of the Megatron tensor, from first to last, as runs of rows of its sources."""
    if rule.layout is Layout.GATE_UP_IN_TURNS:
        assert rule.is_stacked, "other sources are read and written by rows that follow each other"
        rows = source_shapes(rule, arch)[0][0] // 2
        return [Segment(0, first, rows, step=2) for first in (0, 1)]
    if rule.layout is not Layout.QKV:
        return [Segment(source, 0, shape[0]) for source, shape in enumerate(source_shapes(rule, arch))]
    key_rows = arch.kv_channels
    query_rows = arch.num_attention_heads // arch.num_query_groups * key_rows
    queries, keys = arch.query_size, arch.key_size
    starts = ((0, 0), (1, 0), (2, 0)) if len(rule.sources) > 1 else ((0, 0), (0, queries), (0, queries + keys))
    segments = []
    for group in range(arch.num_query_groups):
        for (source, start), rows in zip(starts, (query_rows, key_rows, key_rows), strict=True):
            segments.append(Segment(source, start + group * rows, rows))
    return segments


def segments_in(segments: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """The part of ``segments`` that covers Megatron rows ``[start, stop)``, cut at both ends."""
    found = []
    position = 0
    for segment in segments:
        low, high = max(start, position), min(stop, position + segment.rows)
        if low < high:
            found.append(Segment(segment.source, segment.start + (low - position) * segment.step, high - low, segment.step))
        position += segment.rows
    return found


def rank_rows(rule: Rule, num_rows: int, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    """Runs ``[start, stop)`` of the Megatron rows that a tensor-parallel rank holds, in its order.

    Args:
        rule: the tensor.
        num_rows: R, with vocabulary padding.
        tp_rank: the rank.
        tp_size: tp.
    """
    if rule.cuts_columns or not rule.is_cut:
        return [(0, num_rows)]
    if rule.layout in (Layout.GATE_UP, Layout.GATE_UP_IN_TURNS):
        half, part = num_rows // 2, num_rows // 2 // tp_size
        return [(start + tp_rank * part, start + (tp_rank + 1) * part) for start in (0, half)]
    part = num_rows // tp_size
    return [(tp_rank * part, (tp_rank + 1) * part)]


def rank_columns(rule: Rule, num_columns: int, tp_rank: int, tp_size: int) -> slice:
    """The columns that a tensor-parallel rank holds."""
    if not rule.cuts_columns:
        return slice(None)
    part = num_columns // tp_size
    return slice(tp_rank * part, (tp_rank + 1) * part)
