"""Supervised fine-tuning on the chosen response.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps


def chosen_nll(logps: PairLogps) -> Tensor:
    """Negative log-likelihood of the chosen responses, scaled so that its mean over pairs is the token mean.

    Each response counts with the share its tokens have in the global batch: ``[P]``, fp32, with gradient. The mean over the pairs
    of the global batch is the mean over its tokens, whatever pack or rank a pair lands on.
    """
    return -logps.chosen_logps / logps.mean_chosen_length


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The ``sft`` objective has no options."""


class Sft(Objective):
    """``L = -(sum of log p(y_w | x)) / (number of scored chosen tokens)``, both over the global batch.

    The rejected responses are not read and need not be computed.

    No metrics of its own: ``nll/chosen`` is the loss.
    """

    name: ClassVar[str] = "sft"
    Config: ClassVar[type] = SftConfig
    # That of TRL's SFT trainer: a preference objective's would hardly move a model that is to learn a task.
    default_lr: ClassVar[float] = 2e-5

    @property
    def needs(self) -> LogpNeeds:
        """The chosen responses alone."""
        return LogpNeeds(rejected=False)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        return LossOutput(losses=chosen_nll(logps), metrics={})
