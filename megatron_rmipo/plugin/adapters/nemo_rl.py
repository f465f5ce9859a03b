"""Our objectives as a loss function of NeMo-RL's DPO, as of its commit 7ea279a (2026-08-22).

:class:`ObjectiveLoss` stands in the place of its ``DPOLossFn``, on the workers; :class:`ObjectiveBatches` in the place of its
``add_ref_logprobs_to_data``, on the driver, where it lets the policy score what the objective needs beforehand.

Rows come pair by pair, chosen first. Shape letters: B rows, S tokens of a row, P pairs (B / 2).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import BatchLogps, Objective, PairLogps
from megatron_rmipo.objectives.contract import check_prepared
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.plugin.mismatched_rows import mismatched_pairs, padded_rows, tokenized_pairs
from megatron_rmipo.plugin.response_rows import (
    ResponseRows,
    pair_losses,
    pairs_of_rows,
    refuse_needs,
    rows_of_pairs,
    rows_of_responses,
    sums_of_rows,
)

# What ObjectiveBatches puts into a batch, one value a row.
_UNCONDITIONAL = ("unconditional_logps", "unconditional_lengths")
_MEAN_LENGTH, _PREPARED, _PREPARED_ONE = "mean_chosen_length", "prepared/", "prepared_one/"


def refuse_objective(objective: Objective) -> None:
    """Refuse what NeMo-RL cannot give.

    Raises:
        ConfigError: naming the objective and the reason.
    """
    refuse_needs(objective, "NeMo-RL", {"perturbation": "its reference and its policy are never on the device together"})
    if objective.initial_state():
        raise ConfigError(
            f"objective {objective.name} in NeMo-RL: it carries {', '.join(objective.initial_state())} from step to step, for "
            "which its checkpoints have no place; take an objective, or a form of this one, without a state"
        )


class ObjectiveLoss:
    """A ``LossFunction``: the mean of an objective's losses over the pairs of the global batch.

    Args:
        objective: what is trained.
        use_fused_linear_logprobs: as the policy's ``megatron_cfg.use_fused_linear_logprobs`` has it.

    Raises:
        ConfigError: NeMo-RL cannot give what the objective needs.
    """

    def __init__(self, objective: Objective, *, use_fused_linear_logprobs: bool = False) -> None:
        refuse_objective(objective)
        interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        self.loss_type = interfaces.LossType.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.objective = objective

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a micro-batch, each to be summed over micro-batches and ranks.

        Args:
            next_token_logprobs: ``[B, S - 1]``, of the tokens from the second on.
            data: ``input_ids``, ``token_mask``, ``reference_policy_logprobs`` ``[B, S]``, ``sample_mask`` ``[B]``, and what
                :class:`ObjectiveBatches` added.
            global_valid_seqs: rows of the global batch that count.
            global_valid_toks: not read.

        Raises:
            ConfigError: rows do not come in pairs, or ObjectiveBatches was not there.
        """
        needs = self.objective.needs
        scored = data["token_mask"][:, 1:]
        counts = _counts(data)
        fields: dict[str, Any] = {}
        if needs.reference:
            reference = sums_of_rows(data["reference_policy_logprobs"][:, :-1], scored, "interleaved")
            fields["reference"] = reference.logps[counts]
        if needs.unconditional is not None:
            fields["unconditional"] = PairSums(*(_pairs(self.objective, data, name)[counts] for name in _UNCONDITIONAL))
        logps = pair_logps(
            sums_of_rows(next_token_logprobs, scored, "interleaved")[counts],
            mean_chosen_length=_pairs(self.objective, data, _MEAN_LENGTH)[0, 0],
            columns={name: _pairs(self.objective, data, name)[counts, 0] for name in needs.columns},
            batch=_prepared_of(data, counts),
            **fields,
        )
        output = pair_losses(self.objective, logps)
        num_pairs = global_valid_seqs / 2
        loss = output.losses.sum() / num_pairs
        return loss, self._metrics(loss, output.metrics, num_pairs, int(counts.sum()))

    def _metrics(self, loss: Tensor, metrics: Mapping[str, Tensor], num_pairs: Tensor, own_pairs: int) -> dict[str, float]:
        """Ours by their names, and by those that its validation asks for."""
        sums = torch.stack([loss.detach(), *(values.sum() / num_pairs for values in metrics.values())]).tolist()
        named = dict(zip(("loss", *metrics), sums, strict=True))
        return {
            **named,
            "preference_loss": named["loss"],
            "sft_loss": 0.0,
            "accuracy": named.get("rewards/accuracies", 0.0),
            "rewards_chosen_mean": named.get("rewards/chosen", 0.0),
            "rewards_rejected_mean": named.get("rewards/rejected", 0.0),
            "num_valid_samples": float(own_pairs),
        }


class ObjectiveBatches:
    """What the driver makes of each global batch: ``nemo_rl.algorithms.dpo.add_ref_logprobs_to_data = ObjectiveBatches(...)``.

    Args:
        objective: what is trained.
        add_reference: NeMo-RL's ``add_ref_logprobs_to_data``.
        context_token_id: what stands before a response in log p(y): BOS, or what begins every prompt; None for nothing.

    Raises:
        ConfigError: NeMo-RL cannot give what the objective needs.
    """

    def __init__(
        self, objective: Objective, add_reference: Callable[..., Iterator[Any]], *, context_token_id: int | None
    ) -> None:
        refuse_objective(objective)
        self.objective = objective
        self._add_reference = add_reference
        self._context_token_id = None if objective.needs.unconditional == "none" else context_token_id

    def __call__(self, dataloader: Iterable[Any], policy: Any, master_config: Any, is_val: bool = False) -> Iterator[Any]:
        """The batches, each with all that :class:`ObjectiveLoss` reads.

        Raises:
            ConfigError: the policy is to score without gradient, and no batch size is set for that.
        """
        needs = self.objective.needs
        settings = master_config.policy
        if (needs.unconditional or needs.mismatched or needs.batch) and settings.get("logprob_batch_size") is None:
            raise ConfigError(
                f"policy.logprob_batch_size is not set: objective {self.objective.name} has the policy score rows before each "
                "step; set it, to 2 x policy.train_micro_batch_size for example"
            )
        referring = policy if needs.reference else _NoReference(policy)
        for batch in self._add_reference(dataloader, referring, master_config, is_val=is_val):
            self._add_needed(batch, policy, settings.get("make_sequence_length_divisible_by") or 1)
            yield batch

    def _add_needed(self, batch: Any, policy: Any, multiple_of: int) -> None:
        needs = self.objective.needs
        counts = _counts(batch)
        scored = batch["token_mask"][:, 1:] != 0
        lengths = pairs_of_rows(scored.sum(dim=1), "interleaved")[counts].float()
        mean_length = lengths[:, 0].mean() if len(lengths) and lengths[:, 0].sum() > 0 else torch.tensor(1.0)
        batch[_MEAN_LENGTH] = mean_length.expand(len(scored)).clone()
        if needs.unconditional is not None:
            rows = rows_of_responses(batch["input_ids"], batch["token_mask"], context_token_id=self._context_token_id)
            scores = _score(policy.get_logprobs, "logprobs", batch, _widened(rows, multiple_of))
            for name, values in zip(_UNCONDITIONAL, (scores.logps, scores.lengths), strict=True):
                batch[name] = rows_of_pairs(values, "interleaved")
        whole = self._whole(batch, policy, counts, mean_length, multiple_of)
        for name, values in self._prepared(whole, int(counts.sum())).items():
            if values.dim():
                of_pairs = torch.zeros(len(counts), dtype=torch.float32)
                of_pairs[counts] = values.float()
                batch[_PREPARED + name] = rows_of_pairs(of_pairs, "interleaved")
            else:
                batch[_PREPARED_ONE + name] = values.float().expand(len(scored)).clone()

    def _prepared(self, whole: BatchLogps, num_pairs: int) -> dict[str, Tensor]:
        prepared = self.objective.prepare(whole, self.objective.initial_state())
        check_prepared(self.objective, prepared, num_pairs)
        return prepared

    def _whole(self, batch: Any, policy: Any, counts: Tensor, mean_length: Tensor, multiple_of: int) -> BatchLogps:
        needs = self.objective.needs
        pairs: PairLogps | None = None
        if needs.batch:
            rows = ResponseRows(batch["input_ids"], _attended(batch), batch["token_mask"] != 0)
            reference = None
            if needs.reference:
                kept = batch["reference_policy_logprobs"][:, :-1]
                reference = sums_of_rows(kept, batch["token_mask"][:, 1:], "interleaved").logps[counts]
            pairs = pair_logps(
                _score(policy.get_logprobs, "logprobs", batch, rows)[counts],
                mean_chosen_length=mean_length,
                reference=reference,
                columns={name: _pairs(self.objective, batch, name)[counts, 0] for name in needs.columns},
            )
        if not needs.mismatched:
            return BatchLogps(pairs, None, None, torch.ones(int(counts.sum()), 2, dtype=torch.bool))
        tokens = tokenized_pairs(batch["input_ids"], _attended(batch), batch["token_mask"], order="interleaved")
        kept_pairs = torch.nonzero(counts).flatten().tolist()
        other = dict(zip(kept_pairs, mismatched_pairs([tokens[pair] for pair in kept_pairs]), strict=True))
        # A pair that does not count keeps its place, so that every rank has as many rows.
        rows = padded_rows(
            [other.get(pair, one) for pair, one in enumerate(tokens)],
            batch["input_ids"].device,
            order="interleaved",
            multiple_of=multiple_of,
        )
        scores = _score(policy.get_logprobs, "logprobs", batch, rows)[counts]
        reference = _score(policy.get_reference_policy_logprobs, "reference_logprobs", batch, rows).logps[counts]
        return BatchLogps(pairs, scores.logps, reference, scores.lengths > 0)


class _NoReference:
    """A policy whose reference is not asked: the objective does not read it."""

    def __init__(self, policy: Any) -> None:
        self.sharding_annotations = policy.sharding_annotations

    def get_reference_policy_logprobs(self, data: Any, **_: Any) -> dict[str, Tensor]:
        """Zeros in the place of log-probs."""
        return {"reference_logprobs": torch.zeros(data["input_ids"].shape)}


def _score(ask: Callable[..., Any], key: str, batch: Any, rows: ResponseRows) -> PairSums:
    """Rows scored without gradient by all workers; what a worker says of a token stands at that token."""
    asked = type(batch)(
        {
            "input_ids": rows.token_ids,
            "input_lengths": rows.attended.sum(dim=1),
            "token_mask": rows.scored.long(),
            "sample_mask": batch["sample_mask"],
        }
    )
    return sums_of_rows(ask(asked)[key][:, : rows.scored.shape[1]].to(rows.scored.device), rows.scored, "interleaved")


def _widened(rows: ResponseRows, multiple_of: int) -> ResponseRows:
    more = -rows.token_ids.shape[1] % multiple_of
    return ResponseRows(*(torch.nn.functional.pad(part, (0, more)) for part in (rows.token_ids, rows.attended, rows.scored)))


def _attended(batch: Any) -> Tensor:
    places = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    lengths: Tensor = batch["input_lengths"]
    return places < lengths[:, None]


def _counts(data: Mapping[str, Any]) -> Tensor:
    """Which pairs count, bool ``[P]``."""
    return pairs_of_rows(data["sample_mask"] > 0, "interleaved").all(dim=1)


def _pairs(objective: Objective, data: Mapping[str, Any], name: str) -> Tensor:
    """A value a row as ``[P, 2]``."""
    if name not in data:
        raise ConfigError(
            f"objective {objective.name}: the batch has no {name!r}. Columns of the data come with the collator, everything else "
            "from ObjectiveBatches in the place of nemo_rl.algorithms.dpo.add_ref_logprobs_to_data"
        )
    values: Tensor = data[name]
    return pairs_of_rows(values, "interleaved")


def _prepared_of(data: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, values in data.items():
        if name.startswith(_PREPARED):
            found[name.removeprefix(_PREPARED)] = pairs_of_rows(values, "interleaved")[counts, 0]
        elif name.startswith(_PREPARED_ONE):
            found[name.removeprefix(_PREPARED_ONE)] = values[0]
    return found
