"""Prepared pairs for a DataLoader of one's own, and the plain dicts of tensors that the loss takes from it.

Shape letters: P pairs of a micro-batch, B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rmipo.data.batches.padding import PaddedRows, PaddedShape, pad_pairs, pad_pairs_and_responses
from megatron_rmipo.data.store.collection import PairData
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.contract import check_objective
from megatron_rmipo.passes.pair_losses import KnownPairs
from megatron_rmipo.plugin.batches import check_padded, pairs_for
from megatron_rmipo.plugin.context import ContextTokenId, context_token
from megatron_rmipo.runtime.groups import current_device
from megatron_rmipo.runtime.transfers import to_device

_TOKENS = ("tokens", "labels", "loss_mask", "position_ids")
_COLUMN = "columns/"


class PreferenceDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs one by one, as token ids, with what the objective reads beside them.

    An item is ``{"prompt", "chosen", "rejected"}``, each an int64 array of token ids; where the objective compares with a
    reference, ``"reference_logps"``, fp32 ``[2]`` of (chosen, rejected); and ``"columns/NAME"``, a number, for each it reads.

    Args:
        data: as of :func:`megatron_rmipo.plugin.batches.preference_batches`.
        objective: what is trained.

    Attributes:
        pairs, objective: the data, the objective.
        mean_chosen_length: scored chosen tokens a pair, over all pairs.

    Raises:
        ConfigError: the objective needs the whole global batch, which nobody knows who loads pair by pair.
        DataError: a data set is missing or incomplete, or has not what the objective reads.
    """

    def __init__(self, data: PairData, objective: Objective) -> None:
        check_objective(objective)
        _refuse_whole_batch(objective)
        self.pairs = pairs_for(data, objective)
        self.objective = objective
        self.mean_chosen_length = self.pairs.mean_chosen_length() or 1.0

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 ``[pairs, 3]``, tokens of prompt, chosen and rejected of all pairs; of some: ``pairs.lengths_of(indices)``."""
        return self.pairs.lengths_of(np.arange(len(self.pairs)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, at = self.pairs[index], np.array([index])
        item: dict[str, Any] = {
            name: np.asarray(getattr(pair, name), dtype=np.int64) for name in ("prompt", "chosen", "rejected")
        }
        scores = self.pairs.scores_of(at) if self.objective.needs.reference else None
        if scores is not None:
            item["reference_logps"] = scores[0]
        columns = self.pairs.values_of(at, self.objective.needs.columns)
        return item | {_COLUMN + name: float(values[0]) for name, values in columns.items()}


class PreferenceCollator:
    """Items of a :class:`PreferenceDataset` to a micro-batch: padded rows, chosen and rejected of a pair one after the other.

    It gives ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, int64 ``[B, S]``: labels are the next tokens, the mask is
    1 where one belongs to a response. Where the objective reads log p(y), the responses alone follow as further rows in the same
    order; where it reads no rejected responses, they have no rows. Beside them stand ``vocab_size``, ``mean_chosen_length``, and
    ``reference_logps`` fp32 ``[P, 2]`` and ``columns/NAME`` fp32 ``[P]`` where the objective reads such.

    Args:
        dataset: whose items they are. Of its pairs is the mean length by which an objective may divide: here that of all pairs,
            and not that of each global batch.
        vocab_size: of the model, without padding for tensor parallelism.
        context_token_id: as of :func:`megatron_rmipo.plugin.batches.preference_batches`.
        multiple_of: S is a multiple of this many tokens, TP under sequence parallelism.
        pad_to: S; None: as long as the longest row makes it.

    Raises:
        ConfigError: the objective cannot do with padded rows, or a pair is longer than ``pad_to``.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        *,
        vocab_size: int,
        context_token_id: ContextTokenId = "bos",
        multiple_of: int = 1,
        pad_to: int | None = None,
    ) -> None:
        needs = dataset.objective.needs
        check_padded(dataset.objective, vocab_size)
        self.shape = PaddedShape(vocab_size, with_rejected=needs.rejected, multiple_of=multiple_of, pad_to=pad_to)
        self.shape.check(dataset.pairs.all_lengths(), dataset.pairs.describe)
        self.unconditional = needs.unconditional
        self.context_token_id = context_token(context_token_id, dataset.pairs) if needs.unconditional == "bos" else None
        self.mean_chosen_length = dataset.mean_chosen_length

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The micro-batch of some items, on the CPU."""
        pairs = [TokenizedPair(item["prompt"], item["chosen"], item["rejected"]) for item in items]
        numbers = list(range(len(pairs)))
        if self.unconditional is None:
            rows = pad_pairs(pairs, numbers, self.shape)
        else:
            rows = pad_pairs_and_responses(pairs, numbers, self.shape, context_token_id=self.context_token_id)
        given: dict[str, Any] = {
            "tokens": rows.token_ids,
            "labels": rows.labels,
            "loss_mask": rows.loss_mask,
            "position_ids": rows.position_ids,
            "vocab_size": self.shape.vocab_size,
            "mean_chosen_length": self.mean_chosen_length,
        }
        if "reference_logps" in items[0]:
            given["reference_logps"] = torch.from_numpy(np.stack([item["reference_logps"] for item in items]))
        columns = [name for name in items[0] if name.startswith(_COLUMN)]
        return given | {name: torch.tensor([item[name] for item in items], dtype=torch.float32) for name in columns}


def given_rows(given: Mapping[str, Any], objective: Objective) -> tuple[PaddedRows, KnownPairs]:
    """What a micro-batch as of :class:`PreferenceCollator` says: rows on the CPU, and what is known of their pairs on the device.

    Raises:
        ConfigError: something that the objective reads is not there, or is not told by the micro-batch alone.
    """
    _refuse_whole_batch(objective)
    needs = objective.needs
    wanted = [*_TOKENS, "vocab_size", "mean_chosen_length", *(_COLUMN + name for name in needs.columns)]
    wanted += ["reference_logps"] if needs.reference else []
    if missing := [name for name in wanted if name not in given]:
        raise ConfigError(f"a micro-batch lacks {', '.join(missing)}, which objective {objective.name} reads.")
    rows = PaddedRows.of_tensors(
        *(given[name].cpu() for name in _TOKENS),
        vocab_size=given["vocab_size"],
        with_rejected=needs.rejected,
        with_alone=needs.unconditional is not None,
    )
    device: dict[str, Tensor] = {name: to_device(given[name].float()) for name in wanted if isinstance(given[name], Tensor)}
    known = KnownPairs(
        unconditional=None,
        reference=device.get("reference_logps"),
        columns={name: device[_COLUMN + name] for name in needs.columns},
        batch={},
        mean_chosen_length=torch.full((), float(given["mean_chosen_length"]), device=current_device()),
    )
    return rows, known


def read_of_whole_batch(objective: Objective) -> list[str]:
    """What an objective has to know of a global batch before the losses of its micro-batches, in words."""
    needs = objective.needs
    reasons = {
        "log-probs of the whole batch": needs.batch,
        "log-probs of mismatched pairs": needs.mismatched,
        "a reference in memory": needs.perturbation is not None,
        "what it carries from step to step": bool(objective.initial_state()),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _refuse_whole_batch(objective: Objective) -> None:
    if wanted := read_of_whole_batch(objective):
        raise ConfigError(
            f"objective {objective.name} reads {', '.join(wanted)}, which micro-batches alone do not tell. Use "
            "megatron_rmipo.plugin.batches.preference_batches, whose micro-batches know their global batch."
        )
