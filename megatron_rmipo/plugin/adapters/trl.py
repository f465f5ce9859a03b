"""Our objectives in TRL's ``DPOTrainer``, as of trl 1.16.0 with transformers 5.24.0.

Its model, data, collator, reference and loop stay; the loss is ours. Nothing here imports trl.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import Objective, State
from megatron_rmipo.objectives.contract import check_state
from megatron_rmipo.plugin.adapters.causal_lm import CausalLmLoss, StepFacts

# Arguments of DPOConfig that say what our objective says itself.
_OF_THE_LOSS = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"),
    *("use_weighting", "discopop_tau"),
)
_FACTS = "step_facts"


class ObjectiveState(TrainerCallback, ExportableState):
    """What an objective carries from step to step, in the trainer's own checkpoints.

    Attributes:
        values: the state.
        advance: gives the state after the step that runs; None where the step had no loss.
    """

    def __init__(self) -> None:
        self.values: State = {}
        self.advance: Callable[[State], State] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **further: Any) -> None:
        """Called after each optimizer step, before anything is saved."""
        if self.advance is not None:
            self.values, self.advance = self.advance(self.values), None

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``."""
        return {"args": {}, "attributes": {"values": dict(self.values)}}


# What stands behind the mixin is the user's trainer.
_Trainer: Any = object


class ObjectiveTrainer(_Trainer):
    """A mixin for ``DPOTrainer``: ``class RmipoTrainer(ObjectiveTrainer, DPOTrainer)``.

    A step's global batch is that of all micro-batches and all data-parallel processes: the loss is the mean over its pairs, and
    what an objective wants to know of it is computed over all of it.

    Args:
        objective: of :func:`megatron_rmipo.objectives.registry.build_objective`.
        context_token_id: what stands before a response in log p(y): the tokenizer's BOS unless given; None for nothing.
        args, kwargs: those of the trainer.

    Raises:
        ConfigError: an argument of the loss is set, which would do nothing; or there is no BOS, and nothing in its place.
    """

    def __init__(
        self, *args: Any, objective: Objective, context_token_id: int | Literal["bos"] | None = "bos", **kwargs: Any
    ) -> None:
        self.objective = objective
        super().__init__(*args, **kwargs)
        _refuse_arguments(self)
        needs = objective.needs
        has_reference = needs.reference or needs.mismatched or needs.perturbation is not None
        if not has_reference:
            self.ref_model = None
        if needs.columns:
            self.data_collator: Any = with_columns(self.data_collator, needs.columns)
        holder = ObjectiveState()
        holder.values = objective.initial_state()
        self.add_callback(holder)
        self._outputs: list[Mapping[str, Tensor]] = []
        # By mode, then metric: fp32 [sum, number of pairs] of this process.
        self._totals: dict[str, dict[str, Tensor]] = {}
        self._loss = CausalLmLoss(
            objective,
            context_token_id=_context_token(self, context_token_id),
            reference=self._reference_of() if has_reference else None,
            group=dist.group.WORLD if self.accelerator.num_processes > 1 else None,
        )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train.

        Raises:
            ConfigError: a run is resumed whose objective carries a state that would not be restored.
        """
        if resume_from_checkpoint and self._holder.values and not self.args.restore_callback_states_from_checkpoint:
            raise ConfigError(
                f"objective {self.objective.name} carries {', '.join(self._holder.values)} from step to step, in the checkpoint: "
                "resume with restore_callback_states_from_checkpoint=True"
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The step's micro-batches, each with what its losses have to know of the whole."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._outputs = []
        if batches:
            with self.compute_loss_context_manager():
                facts = self._loss.before_step(self.model_wrapped, batches, self._holder.values)
            batches = [{**batch, _FACTS: one} for batch, one in zip(batches, facts, strict=True)]
        return batches, num_items

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch.

        Raises:
            ConfigError: the model's outputs are asked for.
        """
        if return_outputs:
            raise ConfigError("the loss gives no model outputs: leave compute_metrics out, and call evaluate, not predict")
        batch = {name: value for name, value in inputs.items() if name != _FACTS}
        facts: StepFacts | None = inputs.get(_FACTS)
        training = facts is not None
        if facts is None:
            # A batch of an evaluation is a whole of its own.
            (facts,) = self._loss.before_step(model, [batch], self._holder.values)
        output = self._loss(model, batch, facts)
        values = {"loss": output.losses.detach(), **output.metrics}
        self._note("train" if training else "eval", output.metrics)
        if training and self._holder.values:
            self._outputs.append(values)
            self._holder.advance = lambda state: self._advanced(state, facts.prepared)
        return output.losses.sum() * facts.weight

    @property
    def _holder(self) -> ObjectiveState:
        # Resuming puts another in its place.
        return next(one for one in self.callback_handler.callbacks if isinstance(one, ObjectiveState))

    def _advanced(self, state: State, prepared: Mapping[str, Tensor]) -> State:
        metrics = {name: self._loss.gather([output[name] for output in self._outputs]) for name in self._outputs[0]}
        state = self.objective.advance(state, prepared, metrics)
        check_state(self.objective, state)
        return state

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the objective's metrics too, means over the pairs of all processes since the last time."""
        mode = "train" if self.model.training else "eval"
        if totals := self._totals.pop(mode, {}):
            sums, counts = self.accelerator.reduce(torch.stack(list(totals.values()), dim=1), reduction="sum").tolist()
            for name, total, count in zip(totals, sums, counts, strict=True):
                self._metrics[mode][name] = [total / count if count else math.nan]
        super().log(logs, start_time)

    def _note(self, mode: str, metrics: Mapping[str, Tensor]) -> None:
        """Add up a micro-batch's metrics; a pair without a value does not count."""
        totals = self._totals.setdefault(mode, {})
        for name, values in metrics.items():
            known = ~values.isnan()
            total = torch.stack([torch.where(known, values, 0.0).sum(), known.sum()])
            totals[name] = totals[name] + total if name in totals else total

    def _reference_of(self) -> Callable[..., Any] | None:
        """The reference: a model of its own, or the policy without the adapter that is trained; None where there is neither."""
        if self.ref_model is not None:
            return self.ref_model
        policy = self.accelerator.unwrap_model(self.model)
        return _WithoutAdapter(policy) if hasattr(policy, "disable_adapter") else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str]
        self._signature_columns = list(dict.fromkeys((*self._signature_columns, *self.objective.needs.columns)))


class _WithoutAdapter:
    """A model of peft's as it was before training."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __call__(self, **inputs: Any) -> Any:
        policy = self._policy
        # Where an adapter is trained further, the trainer keeps it as it was under this name.
        if "ref" not in policy.peft_config:
            with policy.disable_adapter():
                return policy(**inputs)
        active = policy.active_adapter
        policy.set_adapter("ref")
        try:
            return policy(**inputs)
        finally:
            policy.set_adapter(active)


def with_columns(
    collator: Callable[[list[Any]], dict[str, Any]], columns: Sequence[str]
) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that also hands on numbers beside the pairs, fp32 ``[P]`` each, as ``columns``.

    Raises:
        DataError: when called with a row that lacks one.
    """

    def collate(examples: list[Any]) -> dict[str, Any]:
        missing = [name for name in columns for example in examples if not isinstance(example.get(name), float | int)]
        if missing:
            raise DataError(f"a row of the data has no number {missing[0]!r}, which the objective reads: add that column")
        numbers = {name: torch.tensor([float(example[name]) for example in examples]) for name in columns}
        return {**collator(examples), "columns": numbers}

    return collate


def _refuse_arguments(trainer: Any) -> None:
    args, name = trainer.args, trainer.objective.name
    for field in dataclasses.fields(args):
        if field.name not in _OF_THE_LOSS:
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(args, field.name)
        if value != default:
            raise ConfigError(
                f"{type(args).__name__}({field.name}={value!r}) would do nothing: objective {name} has options of its own, "
                "for build_objective"
            )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ConfigError("the router's auxiliary loss is not added here: set router_aux_loss_coef=0.0")
    if getattr(trainer, "_tp_size", 1) > 1:
        raise ConfigError(
            "tensor parallelism by accelerate: processes that share a batch are not told apart; use data parallelism"
        )


def _context_token(trainer: Any, given: int | str | None) -> int | None:
    if given != "bos":
        assert not isinstance(given, str)
        return given
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    token_id: int | None = tokenizer.bos_token_id
    if token_id is None and trainer.objective.needs.unconditional == "bos":
        raise ConfigError(
            f"objective {trainer.objective.name} scores each response after a BOS token, and the tokenizer has none: give "
            "context_token_id, the id of the special token that begins every prompt, or None for no context"
        )
    return token_id
