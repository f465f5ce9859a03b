"""What every objective is given, what it returns, and what it declares it needs.

Shape letter: P pairs: of one pack in a call of an objective, of the whole global batch in :class:`BatchLogps`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from megatron_rmipo.objectives.options import check_choice, check_number

State: TypeAlias = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of P preference pairs, summed over the scored tokens of each response.

    All tensors are fp32 ``[P]``. Only ``chosen_logps`` and ``rejected_logps`` carry gradient. A response that a row does not have
    (unpaired and supervised data) has a sum and a length of 0, but for objectives that do not read rejected responses at all.

    Attributes:
        chosen_logps, rejected_logps: sum of log p(y | x) over the response.
        chosen_lengths, rejected_lengths: number of scored tokens of the response.
        mean_chosen_length: mean number of scored chosen tokens over the *global* batch (a scalar tensor). Dividing a sum
            over tokens by it makes the mean over pairs the token mean over the global batch, however the batch is cut.
        uncond_chosen_logps, uncond_rejected_logps: sum of log p(y), the response alone; None unless the objective declares it.
        uncond_chosen_lengths, uncond_rejected_lengths: scored tokens of the response alone: the same as above from a BOS
            context, one fewer (so possibly 0) without one, which is also what a model without such a token gives.
        ref_chosen_logps, ref_rejected_logps: sum of log p(y | x) under the reference; None unless declared.
        extrapolated_chosen_logps, extrapolated_rejected_logps: the sum under ``softmax((1 + e) f - e r)`` of the logits f of the
            policy and r of the reference, e being ``LogpNeeds.perturbation``; None unless declared.
        interpolated_chosen_logps, interpolated_rejected_logps: the same under ``softmax((1 - e) f + e r)``.
        columns: numbers that stand beside each pair in the data, by name, as far as they are declared.
        batch: what :meth:`Objective.prepare` gave: scalars, or ``[P]`` values of these pairs.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    mean_chosen_length: Tensor
    uncond_chosen_logps: Tensor | None = None
    uncond_rejected_logps: Tensor | None = None
    uncond_chosen_lengths: Tensor | None = None
    uncond_rejected_lengths: Tensor | None = None
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    extrapolated_chosen_logps: Tensor | None = None
    extrapolated_rejected_logps: Tensor | None = None
    interpolated_chosen_logps: Tensor | None = None
    interpolated_rejected_logps: Tensor | None = None
    columns: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    batch: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BatchLogps:
    """What :meth:`Objective.prepare` sees: the whole global batch, in its order, without gradient.

    Attributes:
        pairs: log-probabilities as the losses will see them; None unless the objective declares ``batch``.
        mismatched_logps: fp32 ``[P, 2]`` of (chosen, rejected): sum of log p(y' | x) of a response y' to another prompt, the same
            y' for x in every epoch; None unless declared.
        ref_mismatched_logps: the same under the reference.
        has_response: bool ``[P, 2]``: whether there is a mismatched response in each place (unpaired rows have one of the two);
            sums of absent ones are 0.
    """

    pairs: PairLogps | None
    mismatched_logps: Tensor | None
    ref_mismatched_logps: Tensor | None
    has_response: Tensor


@dataclasses.dataclass(frozen=True)
class LogpNeeds:
    """Which passes an objective costs beyond the gradient pass over the chosen and rejected responses.

    Attributes:
        unconditional: ``"bos"``: log p(y) with the response after a BOS token, all its tokens scored, or what stands in for
            one, if that is nothing as with ``"none"``: without any context, its first token not scored; None: not needed.
        rejected: whether the rejected response is needed at all (supervised fine-tuning trains on the chosen one alone).
        reference: log-probabilities under the reference; computed once for the pairs that a run sees, no reference in memory.
        mismatched: log-probabilities of responses to other prompts, under the policy (a forward-only pass before the gradient
            pass) and under the reference (computed once).
        batch: log-probabilities of the whole global batch before its losses (a forward-only pass before the gradient pass).
        perturbation: e > 0: the reference stays in memory, and each response is scored under the logits mixed with its own.
        unpaired: whether rows of one response with a label will do.
        columns: numbers beside each pair in the data that are read, such as ``margin``.

    Raises:
        ValueError: there is no such unconditional context, or the perturbation is not above 0.
    """

    unconditional: Literal["bos", "none"] | None = None
    rejected: bool = True
    reference: bool = False
    mismatched: bool = False
    batch: bool = False
    perturbation: float | None = None
    unpaired: bool = False
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unconditional is not None:
            check_choice("unconditional", self.unconditional, ("bos", "none"))
        if self.perturbation is not None:
            check_number("perturbation", self.perturbation, low=0.0, low_is_valid=False)


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What an objective returns for P pairs.

    Attributes:
        losses: fp32 ``[P]`` with gradient; the batch loss is their mean over the global batch.
        metrics: name -> detached fp32 ``[P]``; NaN where a pair has no such value (a response it does not have). Every objective
            gives ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` and ``rewards/accuracies`` where they are defined.
            What is the same for all, ``logps/*``, ``nll/chosen`` and ``tokens/*``, whoever runs it adds: see
            :mod:`megatron_rmipo.objectives.metrics`.
        distributions: the names among ``metrics`` whose percentiles are worth showing besides their mean.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    distributions: tuple[str, ...] = ()


class Objective(ABC):
    """A preference objective: a pure function of log-probabilities.

    A subclass names itself, gives a frozen dataclass of options (``Config``; each field has ``metadata={"help": ...}``),
    declares its needs and computes the loss. Options are validated in ``Config.__post_init__`` with ``ValueError``.

    One that depends on statistics of the batch, or on what earlier batches were like, overrides :meth:`prepare`, and for the
    latter :meth:`initial_state` and :meth:`advance`. All three are pure: the trainer keeps the state, in memory and in
    checkpoints, and advances it after an optimizer step and at no other time.

    Attributes:
        name: how it is called in messages.
        Config: the dataclass of its options.
        default_lr: the peak learning rate of a run that is given none.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    default_lr: ClassVar[float] = 6e-7

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def needs(self) -> LogpNeeds:
        """The log-probabilities this objective reads, given its options."""
        return LogpNeeds()

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one is made of: itself, where it is made of no others."""
        return (self,)

    def initial_state(self) -> State:
        """What is carried from step to step, as it is before the first one: name -> number. Empty for most objectives."""
        return {}

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """What the losses of a global batch need to know of it as a whole, and of the state.

        Returns:
            Name -> a scalar, or one value per pair ``[P]``: given to each call as ``logps.batch``.
        """
        return {}

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """The state after an optimizer step.

        Args:
            state: before the step.
            prepared: what :meth:`prepare` gave for the step's batch.
            metrics: of the whole batch, ``[P]`` each.
        """
        return state

    def remark(self, metrics: Mapping[str, Tensor]) -> str | None:
        """What the metrics of an evaluation call for, in a line to be shown at its end; None where there is nothing to say.

        Args:
            metrics: of all its pairs, ``[P]`` each, as the calls gave them.
        """
        return None

    @abstractmethod
    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """The field's four reward metrics from detached fp32 ``[P]`` rewards."""
    chosen_rewards, rejected_rewards = chosen_rewards.detach(), rejected_rewards.detach()
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
    }


def smoothed_log_sigmoid_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) logsigmoid(z) - e logsigmoid(-z)``, the conservative form of the logistic loss (``[P]`` -> ``[P]``)."""
    loss = -torch.nn.functional.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * torch.nn.functional.logsigmoid(-logits)
