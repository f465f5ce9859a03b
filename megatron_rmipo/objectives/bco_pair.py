"""BCO on pairs: each response classified on its own, against what rewards have been on the whole.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, Objective, PairLogps, State, reward_metrics
from megatron_rmipo.objectives.batch_statistics import batch_log_ratios
from megatron_rmipo.objectives.log_ratios import BetaConfig, reference_log_ratios
from megatron_rmipo.objectives.options import check_choice


@dataclasses.dataclass(frozen=True)
class BcoPairConfig(BetaConfig):
    """Options of ``bco_pair``.

    Raises:
        ValueError: an option is outside its range.
    """

    reward_shift: Literal["running_mean", "none"] = dataclasses.field(
        default="running_mean",
        metadata={"help": "rewards are compared with their mean over all batches so far, running_mean, or with 0, none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reward_shift", self.reward_shift, ("running_mean", "none"))


class BcoPair(Objective):
    """``L = -logsigmoid(r_w - delta) - logsigmoid(delta - r_l)``, ``r = beta (L - R)``, no gradient through ``delta``.

    ``L`` and ``R`` are sums under the policy and the reference. ``delta`` is the mean, over the global batches up to this one and
    with it, of the mean reward of their responses, chosen and rejected; every batch counts the same. It is carried from step to
    step. With ``reward_shift`` ``none`` it is 0, and no pass over the batch is needed. Rewards: ``r``.

    Source: BCO (Jung et al. 2024, arXiv 2404.04656), as TRL's DPO had it; ``none`` as it has it now.
    """

    name: ClassVar[str] = "bco_pair"
    Config: ClassVar[type] = BcoPairConfig
    config: BcoPairConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, and for the shift the whole batch before its losses."""
        return LogpNeeds(reference=True, batch=self._shifts)

    @property
    def _shifts(self) -> bool:
        return self.config.reward_shift == "running_mean"

    def initial_state(self) -> State:
        """The mean of no batches; nothing at all without a shift."""
        return {"delta": 0.0, "num_batches": 0.0} if self._shifts else {}

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``delta`` with this batch in it, a float64 scalar."""
        if not self._shifts:
            return {}
        mean_reward = self.config.beta * torch.cat(batch_log_ratios(batch)).mean()
        return {"delta": state["delta"] + (mean_reward - state["delta"]) / (state["num_batches"] + 1.0)}

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """``delta`` with the step's batch in it."""
        return {"delta": prepared["delta"].item(), "num_batches": state["num_batches"] + 1.0} if self._shifts else state

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen_ratios, rejected_ratios = reference_log_ratios(logps)
        chosen, rejected = self.config.beta * chosen_ratios, self.config.beta * rejected_ratios
        metrics = reward_metrics(chosen, rejected)
        delta = torch.zeros_like(metrics["rewards/chosen"])
        if self._shifts:
            delta = delta + logps.batch["delta"].to(delta)
            metrics["bco/delta"] = delta
        losses = -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
