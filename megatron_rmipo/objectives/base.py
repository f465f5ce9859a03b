"""What every objective is given, what it returns, and what it declares it needs.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of P preference pairs, summed over the scored tokens of each response.

    All tensors are fp32 ``[P]``. Only ``chosen_logps`` and ``rejected_logps`` carry gradient.

    Attributes:
        chosen_logps, rejected_logps: sum of log p(y | x) over the response.
        chosen_lengths, rejected_lengths: number of scored tokens of the response (at least 1).
        uncond_chosen_logps, uncond_rejected_logps: sum of log p(y), the response alone; None unless the objective declares it.
        uncond_chosen_lengths, uncond_rejected_lengths: scored tokens of the response alone: the same as above from a BOS
            context, one fewer (so possibly 0) without one.
        mean_chosen_length: mean number of scored chosen tokens over the *global* batch (a scalar tensor). Dividing a sum
            over tokens by it makes the mean over pairs the token mean over the global batch, however the batch is cut.
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


@dataclasses.dataclass(frozen=True)
class LogpNeeds:
    """Which passes an objective costs beyond the gradient pass over the chosen and rejected responses.

    Attributes:
        unconditional: ``"bos"``: log p(y) with the response after a BOS token, all its tokens scored; ``"none"``: without
            any context, its first token not scored; None: not needed.
        rejected: whether the rejected response is needed at all (supervised fine-tuning trains on the chosen one alone).
    """

    unconditional: str | None = None
    rejected: bool = True


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What an objective returns for P pairs.

    Attributes:
        losses: fp32 ``[P]`` with gradient; the batch loss is their mean over the global batch.
        metrics: name -> detached fp32 ``[P]``. Every objective gives ``rewards/chosen``, ``rewards/rejected``,
            ``rewards/margins`` and ``rewards/accuracies`` where they are defined.
        distributions: the names among ``metrics`` whose percentiles are worth showing besides their mean.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    distributions: tuple[str, ...] = ()


class Objective(ABC):
    """A preference objective: a pure function of log-probabilities.

    A subclass names itself, gives a frozen dataclass of options (``Config``; each field has ``metadata={"help": ...}``),
    declares its needs and computes the loss. Options are validated in ``Config.__post_init__`` with ``ValueError``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def needs(self) -> LogpNeeds:
        """The log-probabilities this objective reads, given its options."""
        return LogpNeeds()

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
