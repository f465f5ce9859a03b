"""KTO: each response on its own against what the policy's drift from the reference is worth on the whole.

Notation: ``Lw, Ll`` sum log p(y | x) of the chosen and rejected response, ``Rw, Rl`` the same under the reference, ``L', R'``
those of a response to another prompt.

Shape letter: P pairs (or rows with one response).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, Objective, PairLogps, State, reward_metrics
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.options import BETA_HELP, check_number


@dataclasses.dataclass(frozen=True)
class KtoConfig:
    """Options of ``kto``.

    Raises:
        ValueError: an option is outside its range, or no response would count.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": BETA_HELP})
    desirable_weight: float = dataclasses.field(default=1.0, metadata={"help": "weight of the chosen (desirable) responses"})
    undesirable_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "weight of the rejected (undesirable) responses"}
    )

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("desirable_weight", self.desirable_weight, low=0.0)
        check_number("undesirable_weight", self.undesirable_weight, low=0.0)
        if self.desirable_weight == self.undesirable_weight == 0.0:
            raise ValueError("desirable_weight 0 with undesirable_weight 0 leaves nothing to learn from; set one above 0")


class Kto(Objective):
    """Mean over the responses of ``1 - sigmoid(beta (Lw - Rw) - z)`` and ``1 - sigmoid(z - beta (Ll - Rl))``, each weighted.

    ``z = max(0, mean of beta (L' - R'))`` over all mismatched responses of the global batch, without gradient: an estimate of
    beta times the divergence of the policy from the reference. It is clamped after the mean, so that one response's noise cannot
    lift it.

    A pair has the mean of its two losses, a row with one response that one, so that the mean over the rows of the batch is the
    mean over its responses. A row has a response where its length is above 0; a data set's rows all have as many.

    The rewards, and what is made of both of them, are NaN where a row lacks the response.

    Source: KTO (Ethayarajh et al. 2024), equations 7 and 8. Table 4 of the RMiPO paper prints the second term with the wrong
    sign, which would reward rejected responses.
    """

    name: ClassVar[str] = "kto"
    Config: ClassVar[type] = KtoConfig
    config: KtoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, responses to other prompts, and no pairs."""
        return LogpNeeds(reference=True, mismatched=True, unpaired=True)

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``z``, a float64 scalar."""
        assert batch.mismatched_logps is not None
        assert batch.ref_mismatched_logps is not None
        ratios = batch.mismatched_logps.double() - batch.ref_mismatched_logps.double()
        return {"z": (self.config.beta * ratios[batch.has_response].mean()).clamp(min=0.0)}

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen_ratios, rejected_ratios = reference_log_ratios(logps)
        chosen_rewards, rejected_rewards = config.beta * chosen_ratios, config.beta * rejected_ratios
        has_chosen, has_rejected = logps.chosen_lengths > 0, logps.rejected_lengths > 0
        z = logps.batch["z"].to(chosen_rewards)
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) rounds to 1.
        chosen_losses = config.desirable_weight * torch.sigmoid(z - chosen_rewards) * has_chosen
        rejected_losses = config.undesirable_weight * torch.sigmoid(rejected_rewards - z) * has_rejected
        num_responses = has_chosen.to(z.dtype) + has_rejected.to(z.dtype)
        metrics = _existing(reward_metrics(chosen_rewards, rejected_rewards), has_chosen, has_rejected)
        metrics["kto/z"] = z.expand_as(num_responses).clone()
        losses = (chosen_losses + rejected_losses) / num_responses
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))


def _existing(rewards: dict[str, Tensor], has_chosen: Tensor, has_rejected: Tensor) -> dict[str, Tensor]:
    """The reward metrics, NaN where a row lacks the response."""
    needed = {"rewards/chosen": has_chosen, "rewards/rejected": has_rejected}
    both = has_chosen & has_rejected
    return {name: values.masked_fill(~needed.get(name, both), float("nan")) for name, values in rewards.items()}
