"""SimPO's reward against a margin per pair that the global batch as a whole decides.

Shape letter: P pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from megatron_rmipo.objectives.base import (
    BatchLogps,
    LogpNeeds,
    LossOutput,
    Objective,
    PairLogps,
    State,
    reward_metrics,
    smoothed_log_sigmoid_loss,
)
from megatron_rmipo.objectives.batch_statistics import mean_gaps


class BatchMarginObjective(Objective):
    """``L = -logsigmoid(beta (bar Lw - bar Ll) - m)``, ``bar L`` the mean log-prob per token, no gradient through ``m``.

    A subclass has the options ``beta`` and ``label_smoothing`` and gives :meth:`margins`. Rewards: ``beta * bar L``; the metric
    ``gamma`` is ``m``.
    """

    config: Any

    @property
    def needs(self) -> LogpNeeds:
        """The whole batch before its losses."""
        return LogpNeeds(batch=True)

    @abstractmethod
    def margins(self, gaps: Tensor) -> Tensor:
        """``m`` of each pair, from the gaps ``bar Lw - bar Ll`` of the global batch, float64 ``[P]`` both."""

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``margin``, float64 ``[P]``."""
        return {"margin": self.margins(mean_gaps(batch))}

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        beta = self.config.beta
        chosen, rejected = logps.chosen_logps / logps.chosen_lengths, logps.rejected_logps / logps.rejected_lengths
        margin = logps.batch["margin"].to(chosen)
        losses = smoothed_log_sigmoid_loss(beta * (chosen - rejected) - margin, self.config.label_smoothing)
        metrics = reward_metrics(beta * chosen, beta * rejected) | {"gamma": margin}
        return LossOutput(losses=losses, metrics=metrics, distributions=("gamma", "rewards/margins"))
