"""Our objectives over a plain causal language model of transformers, on the padded batches of TRL's preference trainers.

A batch has ``input_ids``, ``attention_mask`` and ``completion_mask``, ``[B, S]`` each, all chosen responses before all rejected
ones; perhaps ``ref_chosen_logps`` and ``ref_rejected_logps`` ``[P]``; and ``columns``, a mapping of ``[P]`` numbers.

Shape letters: B rows, S tokens of a row, P pairs (B / 2), N scored tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.logprobs import vocab_parallel_logprobs
from megatron_rmipo.objectives.base import BatchLogps, LossOutput, Objective, PairLogps, State
from megatron_rmipo.objectives.contract import check_prepared
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.plugin.mismatched_rows import mismatched_pairs, padded_rows, tokenized_pairs
from megatron_rmipo.plugin.response_rows import ResponseRows, pair_losses, rows_of_responses, sums_of_rows
from megatron_rmipo.runtime.evaluation_mode import evaluating

Batch: TypeAlias = Mapping[str, Any]
# Called as the model is, with input_ids, attention_mask and use_cache; what it gives has logits [B, S, V].
Model: TypeAlias = Callable[..., Any]
_ROWS = ("input_ids", "attention_mask", "completion_mask")
_FIELDS = {*_ROWS, "ref_chosen_logps", "ref_rejected_logps", "columns"}


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What the losses of one micro-batch have to know of their step's global batch.

    Attributes:
        mean_chosen_length: scored chosen tokens a pair, over the global batch; fp32 scalar.
        weight: of each pair's loss in a loss whose mean over micro-batches and ranks is the mean over the global batch.
        prepared: what ``prepare`` gave, of the whole global batch.
        batch: the same for this micro-batch's pairs.
        reference: fp32 ``[P, 2]``, sums under the reference, as far as they were needed beforehand.
    """

    mean_chosen_length: Tensor
    weight: float
    prepared: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    batch: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reference: Tensor | None = None


class CausalLmLoss:
    """An objective's losses, with all forward passes it needs.

    Args:
        objective: what is trained.
        context_token_id: what stands before a response in log p(y): BOS, or what begins every prompt; None for nothing.
        reference: the reference model, for objectives that need one where batches do not hold its sums.
        group: data-parallel ranks, which share a step's global batch; None: this process has all of it.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        context_token_id: int | None,
        reference: Model | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.objective = objective
        self.context_token_id = None if objective.needs.unconditional == "none" else context_token_id
        self._reference = reference
        self._group = group

    @torch.no_grad()
    def before_step(self, model: torch.nn.Module, batches: Sequence[Batch], state: State) -> list[StepFacts]:
        """Look at a step's global batch before its losses. All ranks of the group call it together.

        Args:
            model: the policy.
            batches: this rank's micro-batches of the step.
            state: of the objective.

        Returns:
            For each micro-batch what :meth:`__call__` needs.
        """
        needs = self.objective.needs
        for batch in batches:
            self._check(batch)
        sizes = [len(batch["input_ids"]) // 2 for batch in batches]
        chosen_lengths = self.gather([_scored(batch)[:size].sum(dim=1) for batch, size in zip(batches, sizes, strict=True)])
        scores = None
        references: list[Tensor | None] = [None] * len(batches)
        with evaluating(model):
            if needs.batch:
                scores = [self._scores(model, _rows(batch)) for batch in batches]
                references = [self._reference_sums(batch) if needs.reference else None for batch in batches]
            mismatched = self._mismatched(model, batches) if needs.mismatched else None
        mean_chosen_length = chosen_lengths.float().mean()
        mean_chosen_length = torch.where(mean_chosen_length > 0, mean_chosen_length, 1.0)
        whole = BatchLogps(
            pairs=None if scores is None else self._whole(batches, scores, references, mean_chosen_length),
            mismatched_logps=None if mismatched is None else mismatched[0].logps,
            ref_mismatched_logps=None if mismatched is None else mismatched[1],
            has_response=torch.ones(len(chosen_lengths), 2, dtype=torch.bool)
            if mismatched is None
            else mismatched[0].lengths > 0,
        )
        prepared = self.objective.prepare(whole, state)
        check_prepared(self.objective, prepared, len(chosen_lengths))
        return self._facts(sizes, mean_chosen_length, prepared, references, len(chosen_lengths))

    def __call__(self, model: torch.nn.Module, batch: Batch, facts: StepFacts) -> LossOutput:
        """Loss ``[P]``, with gradient, and metrics of each pair of a micro-batch.

        Args:
            model: the policy.
            batch: the micro-batch.
            facts: what :meth:`before_step` gave for it.

        Raises:
            DataError: no token of a response is scored, or the batch lacks a column.
            ConfigError: the batch has a field that would not be read, or there is no reference.
        """
        needs = self.objective.needs
        self._check(batch)
        fields: dict[str, Any] = {"reference": facts.reference}
        with torch.no_grad(), evaluating(model):
            if needs.unconditional is not None:
                fields["unconditional"] = self._scores(model, self._responses(batch))
            if needs.reference and facts.reference is None and needs.perturbation is None:
                fields["reference"] = self._reference_sums(batch)
        rows = _rows(batch)
        if not needs.rejected:
            rows.scored[len(rows.scored) // 2 :] = False
        logits, target = _scored_logits(model, rows)
        policy = _sums(vocab_parallel_logprobs(logits, target), rows)
        if needs.perturbation is not None:
            with evaluating(model):
                fields.update(self._mixed(logits.detach(), target, rows, needs.perturbation))
        device = policy.logps.device
        logps = pair_logps(
            policy,
            mean_chosen_length=facts.mean_chosen_length.to(device),
            columns={name: values.to(device) for name, values in self._columns(batch).items()},
            batch={name: values.to(device) for name, values in facts.batch.items()},
            **fields,
        )
        return pair_losses(self.objective, logps)

    def _check(self, batch: Batch) -> None:
        unknown = sorted(set(batch) - _FIELDS)
        if unknown:
            raise ConfigError(
                f"a batch with {unknown[0]!r}: rows of text with {', '.join(_ROWS)} are scored, and nothing else is handed on to "
                "the model; take the collator DataCollatorForPreference"
            )

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        given = batch.get("columns", {})
        missing = [name for name in self.objective.needs.columns if name not in given]
        if missing:
            raise ConfigError(
                f"objective {self.objective.name} reads each pair's {missing[0]} and batch['columns'] has "
                f"{', '.join(given) or 'none'}; let the collator hand it on (with_columns)"
            )
        return {name: given[name] for name in self.objective.needs.columns}

    def _responses(self, batch: Batch) -> ResponseRows:
        return rows_of_responses(batch["input_ids"], batch["completion_mask"], context_token_id=self.context_token_id)

    def _scores(self, model: Model, rows: ResponseRows) -> PairSums:
        logits, target = _scored_logits(model, rows)
        return _sums(vocab_parallel_logprobs(logits, target), rows)

    def _reference_model(self, what: str) -> Model:
        if self._reference is None:
            raise ConfigError(f"objective {self.objective.name} needs {what}, and there is no reference model: give one")
        return self._reference

    def _reference_sums(self, batch: Batch) -> Tensor:
        """``[P, 2]``: those the batch holds, else the reference's."""
        if "ref_chosen_logps" in batch:
            return torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], dim=1).float()
        return self._scores(self._reference_model("log-probs under a reference"), _rows(batch)).logps

    @torch.no_grad()
    def _mixed(self, logits: Tensor, target: Tensor, rows: ResponseRows, share: float) -> dict[str, Tensor]:
        """Sums under the reference and under both mixtures of its logits with the policy's ``[N, V]``."""
        other, _ = _scored_logits(self._reference_model("a reference whose logits are mixed with the policy's"), rows)
        logits, other = logits.float(), other.to(logits.device).float()
        mixtures = {
            "reference": other,
            "extrapolated": torch.lerp(logits, other, -share),
            "interpolated": torch.lerp(logits, other, share),
        }
        return {name: _sums(vocab_parallel_logprobs(mixed, target), rows).logps for name, mixed in mixtures.items()}

    def _mismatched(self, model: Model, batches: Sequence[Batch]) -> tuple[PairSums, Tensor]:
        """The global batch's prompts with responses to other prompts of it: scores under the policy, sums under the reference."""
        reference = self._reference_model("log-probs of responses to other prompts under the reference")
        pairs = [tokenized_pairs(*(batch[name] for name in _ROWS), order="chosen_first") for batch in batches]
        mismatched = mismatched_pairs([pair for own in self._in_order(pairs) for pair in own])
        found = []
        for batch, own, start in zip(batches, pairs, self._starts([len(own) for own in pairs]), strict=True):
            rows = padded_rows(mismatched[start : start + len(own)], batch["input_ids"].device, order="chosen_first")
            found.append((self._scores(model, rows), self._scores(reference, rows).logps))
        logps, lengths = (self.gather([getattr(policy, name) for policy, _ in found]) for name in ("logps", "lengths"))
        return PairSums(logps, lengths), self.gather([sums for _, sums in found])

    def _whole(
        self, batches: Sequence[Batch], scores: list[PairSums], references: list[Tensor | None], mean_chosen_length: Tensor
    ) -> PairLogps:
        sums = [sums for sums in references if sums is not None]
        columns = [self._columns(batch) for batch in batches]
        return pair_logps(
            PairSums(self.gather([one.logps for one in scores]), self.gather([one.lengths for one in scores])),
            mean_chosen_length=mean_chosen_length,
            reference=self.gather(sums) if sums else None,
            columns={name: self.gather([one[name] for one in columns]) for name in self.objective.needs.columns},
        )

    def _facts(
        self,
        sizes: Sequence[int],
        mean_chosen_length: Tensor,
        prepared: Mapping[str, Tensor],
        references: Sequence[Tensor | None],
        num_pairs: int,
    ) -> list[StepFacts]:
        ranks = 1 if self._group is None else self._group.size()
        weight = len(sizes) * ranks / num_pairs
        facts = []
        for size, start, reference in zip(sizes, self._starts(sizes), references, strict=True):
            batch = {name: values[start : start + size] if values.dim() else values for name, values in prepared.items()}
            facts.append(StepFacts(mean_chosen_length, weight, prepared, batch, reference))
        return facts

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """All ranks' values of their micro-batches' pairs, in the order of the global batch, on the CPU.

        That is the order in which a data loader deals micro-batches out: a first one to every rank, then a second.
        """
        return torch.cat(self._in_order([part.cpu() for part in parts]))

    def _starts(self, sizes: Sequence[int]) -> list[int]:
        """Where in the global batch each of this rank's micro-batches begins, from their numbers of pairs."""
        rank = 0 if self._group is None else self._group.rank()
        tagged = self._in_order([(rank, size) for size in sizes])
        ends = itertools.accumulate(size for _, size in tagged)
        return [end - size for end, (owner, size) in zip(ends, tagged, strict=True) if owner == rank]

    def _in_order(self, own: Sequence[Any]) -> list[Any]:
        """One value a micro-batch of this rank: those of all ranks, in the order of the global batch."""
        everywhere: list[Any] = [list(own)]
        if self._group is not None:
            everywhere = [None] * self._group.size()
            dist.all_gather_object(everywhere, list(own), group=self._group)
        rounds = itertools.zip_longest(*([(one,) for one in of_rank] for of_rank in everywhere))
        return [one[0] for dealt in rounds for one in dealt if one is not None]


def _scored(batch: Batch) -> Tensor:
    """Which tokens of rows are scored, bool ``[B, S]``; the first of a row has none before it."""
    scored: Tensor = batch["completion_mask"].bool().clone()
    scored[:, 0] = False
    return scored


def _rows(batch: Batch) -> ResponseRows:
    return ResponseRows(batch["input_ids"], batch["attention_mask"].bool(), _scored(batch))


def _scored_logits(model: Model, rows: ResponseRows) -> tuple[Tensor, Tensor]:
    """Logits ``[N, V]`` that predict the scored tokens, and those tokens ``[N]``. Rows without any are not run."""
    run = rows.scored.any(dim=1)
    # A wrapped model has to run on every rank, be it for nothing.
    run[0] = True
    token_ids, scored = rows.token_ids[run], rows.scored[run, 1:]
    logits = model(input_ids=token_ids, attention_mask=rows.attended[run].long(), use_cache=False).logits
    return logits[:, :-1][scored], token_ids[:, 1:][scored]


def _sums(logprobs: Tensor, rows: ResponseRows) -> PairSums:
    """Sums of the scored tokens' log-probs ``[N]``."""
    scored = rows.scored[:, 1:]
    table = torch.zeros(scored.shape, dtype=logprobs.dtype, device=logprobs.device).masked_scatter(scored, logprobs)
    return sums_of_rows(table, scored, "chosen_first")
