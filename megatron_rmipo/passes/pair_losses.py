"""The loss of each pair out of a model's output for a row, whoever's loop runs it.

Shape letters: P pairs of the global batch, R responses of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.model.logprobs import ReferenceHead
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.metrics import output_of
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.passes.rows import response_sums
from megatron_rmipo.runtime.groups import current_device
from megatron_rmipo.runtime.transfers import to_device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the passes before the losses found. Empty but on the last stage.

    Attributes:
        unconditional: fp32 ``[P, 2, 2]`` on the device, see :func:`megatron_rmipo.passes.rows.score_responses`; pairs of this
            rank alone.
        batch: what :meth:`Objective.prepare` gave, on the CPU, the same on every data-parallel rank.
        references: for each conditional row, its scored tokens' hidden states under the resident reference.
    """

    unconditional: Tensor | None = None
    batch: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    references: Sequence[ReferenceHead] = ()


@dataclasses.dataclass(frozen=True)
class KnownPairs:
    """What passes before the losses, and the reference, said of the pairs of the global batch; all on the device.

    Attributes:
        unconditional: as in :class:`Prepared`.
        reference: fp32 ``[P, 2]``, sums under the reference of (chosen, rejected); None where not needed.
        columns: fp32 ``[P]`` each, numbers beside the pairs.
        batch: fp32, what :meth:`Objective.prepare` gave.
        mean_chosen_length: fp32 scalar.
    """

    unconditional: Tensor | None
    reference: Tensor | None
    columns: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    mean_chosen_length: Tensor

    @classmethod
    def of(cls, batch: RankBatch, prepared: Prepared) -> KnownPairs:
        """Move to the device what is not there yet, once for all packs."""
        return cls(
            unconditional=prepared.unconditional,
            reference=None if batch.reference_scores is None else to_device(torch.from_numpy(batch.reference_scores)),
            columns={name: to_device(values) for name, values in as_tensors(batch.columns).items()},
            batch={name: to_device(values.to(torch.float32)) for name, values in prepared.batch.items()},
            # Not torch.tensor, which would copy, and wait.
            mean_chosen_length=torch.full((), batch.mean_chosen_length, device=current_device()),
        )

    def of_pairs(self, numbers: Tensor) -> dict[str, Any]:
        """For some pairs, numbers ``[pairs]`` of the global batch on the device, arguments of :func:`pair_logps` by name."""
        # A filler reads what is known of pair 0; its loss does not count.
        numbers = numbers.clamp(min=0)
        return {
            "mean_chosen_length": self.mean_chosen_length,
            "unconditional": None if self.unconditional is None else PairSums(*self.unconditional[numbers].unbind(2)),
            "reference": None if self.reference is None else self.reference[numbers],
            "columns": {name: values[numbers] for name, values in self.columns.items()},
            "batch": {name: values[numbers] if values.dim() else values for name, values in self.batch.items()},
        }


@dataclasses.dataclass(frozen=True)
class RowLosses:
    """What an objective said of the pairs of a row.

    Attributes:
        losses: fp32 ``[pairs]`` with gradient.
        numbers: int64 ``[pairs]``, of the global batch; -1 for fillers.
        values: name -> fp32 ``[pairs]`` without gradient, ``loss`` among them.
        distributions: names whose percentiles are worth showing.
    """

    losses: Tensor
    numbers: Tensor
    values: dict[str, Tensor]
    distributions: tuple[str, ...]

    def sum_and_count(self) -> tuple[Tensor, Tensor]:
        """(sum of the losses with gradient, number of pairs as an int tensor), fillers left out.

        Megatron sums both over packs and data-parallel ranks and divides the gradient by the number.
        """
        counts = self.numbers >= 0
        return torch.where(counts, self.losses, 0.0).sum(), counts.sum().to(torch.int)

    def detached(self) -> RowLosses:
        """The same without what the backward pass needs."""
        return dataclasses.replace(self, losses=self.losses.detach())


def row_losses(row: Row, logprobs: Tensor, *, objective: Objective, known: KnownPairs) -> RowLosses:
    """Losses of the row's pairs.

    Args:
        row: on the device.
        logprobs: what the model gave for it on the last stage, ``[N]``, or ``[4, N]`` with a resident reference.
        objective: what is trained.
        known: of the global batch.
    """
    branches = 2 if objective.needs.rejected else 1
    num_responses = row.num_responses - row.num_alone
    sums = response_sums(logprobs, row).view(-1, row.num_responses)
    lengths = row.lengths.to(torch.float32)
    # One line of sums, or four with a resident reference, each [pairs, branches].
    policy, *others = sums[:, :num_responses].reshape(len(sums), -1, branches)
    scored = lengths[:num_responses].view(-1, branches)
    numbers = row.pair_numbers[:num_responses].view(-1, branches)[:, 0]
    told = known.of_pairs(numbers)
    if row.num_alone:
        told["unconditional"] = PairSums(*(part[num_responses:].view(-1, branches) for part in (sums[0], lengths)))
    # A reference in memory, where there is one, says the same as what was kept of it.
    told.update(zip(("reference", "extrapolated", "interpolated"), others, strict=False))
    output = output_of(objective, pair_logps(PairSums(policy, scored), **told))
    values = {"loss": output.losses.detach(), **output.metrics}
    return RowLosses(output.losses, numbers, values, output.distributions)


def as_tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """NumPy columns as tensors, on the CPU."""
    return {name: torch.from_numpy(values) for name, values in columns.items()}
