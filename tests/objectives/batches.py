"""Whole batches for the tests of objectives that look at one before its losses."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import BatchLogps, Objective, PairLogps, State
from tests.objectives.pairs import part_of


def batch_of(pairs: PairLogps | None, mismatched: Tensor | None = None, ref_mismatched: Tensor | None = None) -> BatchLogps:
    """A batch of pairs with both responses, or of mismatched sums alone."""
    values = pairs.chosen_logps if pairs is not None else mismatched
    assert values is not None
    has_response = torch.ones(values.shape[0], 2, dtype=torch.bool)
    return BatchLogps(pairs, mismatched, ref_mismatched, has_response)


def with_prepared(objective: Objective, pairs: PairLogps, state: State | None = None) -> PairLogps:
    """The pairs with what the objective prepares from them as a batch."""
    prepared = objective.prepare(batch_of(pairs), objective.initial_state() if state is None else state)
    return dataclasses.replace(pairs, batch=prepared)


def cut(pairs: PairLogps, *bounds: int) -> list[PairLogps]:
    """The pairs from one bound to the next, with their share of what was prepared for each pair."""
    num_pairs = pairs.chosen_logps.shape[0]
    parts = [slice(low, high) for low, high in zip((0, *bounds), (*bounds, num_pairs), strict=True)]
    prepared = [{name: values[part] if values.ndim else values for name, values in pairs.batch.items()} for part in parts]
    return [dataclasses.replace(part_of(pairs, part), batch=batch) for part, batch in zip(parts, prepared, strict=True)]


def gradients(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Gradients of the chosen and rejected sums, float64."""
    assert pairs.chosen_logps.grad is not None
    assert pairs.rejected_logps.grad is not None
    return pairs.chosen_logps.grad.double(), pairs.rejected_logps.grad.double()
