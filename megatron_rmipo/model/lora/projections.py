"""Which Hugging Face projections a Megatron linear layer computes, and where in this rank's part of it their rows stand.

Megatron's matrices are several projections in one, with their rows in an order of its own; an adapter is of one projection.

Shape letters: R rows of a projection, C its columns, r the adapter's rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.segments import rank_columns, rank_rows, segments_in, segments_of
from megatron_rmipo.families.tensors import megatron_shape, source_shapes
from megatron_rmipo.model.named_tensors import ADAPTER

# What Megatron-Bridge calls the parts of a fused matrix.
_PARTS = {Layout.QKV: ("q", "k", "v"), Layout.GATE_UP: ("gate", "up")}
FactorKind = Literal["A", "B", "magnitude"]
_NAMES: dict[FactorKind, str] = {"A": "linear_in", "B": "linear_out", "magnitude": "magnitude"}


class LowRankShape(NamedTuple):
    """The adapter of a projection.

    Attributes:
        rank: r.
        alpha: what the product of its factors is multiplied by, over the rank or, rank-stabilized, its root.
        is_stabilized: which of them (arXiv:2312.03732).
    """

    rank: int
    alpha: float
    is_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection of a Hugging Face model, as a Megatron linear layer of this rank computes it.

    Attributes:
        name: of its module; of experts, which have one for all of a layer, of that parameter.
        expert: counted from 0 over all of the layer; None for what is not one expert's.
        part: what it is in a matrix of several, such as ``q``; None where it is all of it.
        shape: R and C.
        low_rank: of its adapter.
        rows: runs ``[start, stop)`` of its rows that this rank holds of B, in B's order.
        picked: rows of the B that is held that stand in this rank's output, as runs; None for all.
        places: rows of this rank's output, as runs in the same order.
        columns: of its columns those that this rank has as inputs.
    """

    name: str
    expert: int | None
    part: str | None
    shape: tuple[int, int]
    low_rank: LowRankShape
    rows: tuple[tuple[int, int], ...]
    picked: tuple[tuple[int, int], ...] | None
    places: tuple[tuple[int, int], ...]
    columns: slice


def projections_of(
    rule: Rule, place: Place, arch: ModelArchitecture, adapted: Mapping[str, LowRankShape], tp_rank: int, tp_size: int
) -> tuple[Projection, ...]:
    """The projections with an adapter of the Megatron matrix at ``place``, in its order.

    Args:
        rule: of the matrix.
        place: where it stands.
        arch: the model.
        adapted: name of a projection -> its adapter.
        tp_rank, tp_size: this rank's place among those that cut the matrix.
    """
    named = list(projection_names(rule, place))
    if rule.is_bias or len(megatron_shape(rule, arch)) != 2 or not any(name in adapted for name, _ in named):
        return ()
    num_rows, num_columns = megatron_shape(rule, arch)
    runs = list(_held_runs(rule, arch, num_rows, tp_rank, tp_size))
    first_rows = [0]
    for shape in source_shapes(rule, arch):
        first_rows.append(first_rows[-1] + shape[0])
    found = []
    for name, sources in named:
        if name not in adapted:
            continue
        # Several sources with one adapter stand one below the other.
        start, stop = first_rows[sources[0]], first_rows[sources[-1] + 1]
        own = [(first_rows[source] + low - start, rows, at) for source, low, rows, at in runs if source in sources]
        rows = _joined((low, low + count) for low, count, _ in own)
        is_cut_evenly = not (rule.layout is Layout.QKV and arch.num_query_groups % tp_size)
        found.append(
            Projection(
                name,
                place.expert,
                part_of(rule, place, sources),
                (stop - start, num_columns),
                adapted[name],
                # Ranks that share a key/value head hold stretches of the projections that are no even parts of them.
                rows if is_cut_evenly else ((0, stop - start),),
                None if is_cut_evenly else rows,
                _joined((at, at + count) for _, count, at in own),
                rank_columns(rule, num_columns, tp_rank, tp_size),
            )
        )
    return tuple(found)


def projection_names(rule: Rule, place: Place) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the projections of a Megatron matrix, and the numbers of the rule's sources that each is made of."""
    if rule.per_expert and rule.joined is not None:
        yield rule.joined.format(layer=place.layer), tuple(range(len(rule.sources)))
        return
    for number, name in enumerate(rule.source_names(place)):
        yield name.removesuffix(".weight"), (number,)


def part_of(rule: Rule, place: Place, sources: tuple[int, ...]) -> str | None:
    """What a projection is called in a matrix of several, such as ``q``; None where it is all of it."""
    return _PARTS[rule.layout][sources[0]] if len(list(projection_names(rule, place))) > 1 else None


def adapter_key(megatron: str, place: Place) -> str:
    """What a checkpoint calls the adapter of a matrix: by its layer's number, and without an expert's."""
    name = megatron if place.layer is None else megatron.replace("layers.", f"layers.{place.layer}.", 1)
    return f"{name.removesuffix('.weight')}.{ADAPTER}"


def factor_name(part: str | None, kind: FactorKind) -> str:
    """What a factor is called behind its adapter's name."""
    return (f".adapter_{part}" if part is not None else "") + f".{_NAMES[kind]}.weight"


def _held_runs(
    rule: Rule, arch: ModelArchitecture, num_rows: int, tp_rank: int, tp_size: int
) -> Iterator[tuple[int, int, int, int]]:
    """Runs of rows of this rank's part, in its order: source, first row there, how many, first row in the part."""
    position, segments = 0, segments_of(rule, arch)
    for start, stop in rank_rows(rule, num_rows, tp_rank, tp_size):
        for segment in segments_in(segments, start, stop):
            assert segment.step == 1, f"{rule.megatron}: rows of its sources stand in turns"
            yield segment.source, segment.start, segment.rows, position
            position += segment.rows


def _joined(runs: Iterator[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The runs, those that follow each other as one."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)
