"""Pairs of log-probabilities for the tests of objectives. Imports nothing but torch and what is tested."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import PairLogps


def make_pairs(
    chosen: list[float],
    rejected: list[float],
    lengths: tuple[list[int], list[int]],
    uncond: tuple[list[float], list[float]] | None = None,
    uncond_lengths: tuple[list[int], list[int]] | None = None,
    ref: tuple[list[float], list[float]] | None = None,
) -> PairLogps:
    """Pairs from plain numbers; the unconditional lengths are those of the responses unless given."""

    def tensor(values: list[float] | list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    counts = uncond_lengths or lengths
    return PairLogps(
        chosen_logps=tensor(chosen).requires_grad_(),
        rejected_logps=tensor(rejected).requires_grad_(),
        chosen_lengths=tensor(lengths[0]),
        rejected_lengths=tensor(lengths[1]),
        mean_chosen_length=tensor(lengths[0]).mean(),
        uncond_chosen_logps=tensor(uncond[0]) if uncond else None,
        uncond_rejected_logps=tensor(uncond[1]) if uncond else None,
        uncond_chosen_lengths=tensor(counts[0]) if uncond else None,
        uncond_rejected_lengths=tensor(counts[1]) if uncond else None,
        ref_chosen_logps=tensor(ref[0]) if ref else None,
        ref_rejected_logps=tensor(ref[1]) if ref else None,
    )


def random_pairs(num_pairs: int, seed: int, *, context: str = "bos") -> PairLogps:
    """Pairs of odd lengths with log-probabilities near -2 a token, a PMI of either sign and a reference a few nats off."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_pairs, generator=generator)

    lengths = [torch.randint(2, 60, (num_pairs,), generator=generator).float() for _ in range(2)]
    logps = [length * uniform(-3.0, -1.0) for length in lengths]
    uncond = [logp + uniform(-2.0, 1.0) for logp in logps]
    ref = [logp + uniform(-3.0, 3.0) for logp in logps]
    dropped = 0.0 if context == "bos" else 1.0
    return PairLogps(
        chosen_logps=logps[0].requires_grad_(),
        rejected_logps=logps[1].requires_grad_(),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        mean_chosen_length=lengths[0].mean(),
        uncond_chosen_logps=uncond[0],
        uncond_rejected_logps=uncond[1],
        uncond_chosen_lengths=lengths[0] - dropped,
        uncond_rejected_lengths=lengths[1] - dropped,
        ref_chosen_logps=ref[0],
        ref_rejected_logps=ref[1],
    )


def swapped(pairs: PairLogps) -> PairLogps:
    """The same pairs with chosen and rejected exchanged."""
    return dataclasses.replace(
        pairs,
        chosen_logps=pairs.rejected_logps,
        rejected_logps=pairs.chosen_logps,
        chosen_lengths=pairs.rejected_lengths,
        rejected_lengths=pairs.chosen_lengths,
        uncond_chosen_logps=pairs.uncond_rejected_logps,
        uncond_rejected_logps=pairs.uncond_chosen_logps,
        uncond_chosen_lengths=pairs.uncond_rejected_lengths,
        uncond_rejected_lengths=pairs.uncond_chosen_lengths,
        ref_chosen_logps=pairs.ref_rejected_logps,
        ref_rejected_logps=pairs.ref_chosen_logps,
    )


def part_of(pairs: PairLogps, part: slice) -> PairLogps:
    """Some of the pairs, as one pack of the same global batch."""
    columns = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(pairs)}
    cut = {name: column[part] for name, column in columns.items() if isinstance(column, Tensor) and column.ndim == 1}
    return dataclasses.replace(pairs, **cut)


def fresh(pairs: PairLogps) -> PairLogps:
    """The same pairs with log-probabilities that have no gradient yet."""
    return dataclasses.replace(
        pairs,
        chosen_logps=pairs.chosen_logps.detach().clone().requires_grad_(),
        rejected_logps=pairs.rejected_logps.detach().clone().requires_grad_(),
    )
