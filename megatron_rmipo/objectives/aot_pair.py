"""AOT: the chosen responses of a batch compared with the rejected ones as two distributions, rank by rank.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
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
from megatron_rmipo.objectives.batch_statistics import batch_log_ratios
from megatron_rmipo.objectives.log_ratios import BetaConfig, reference_log_ratios
from megatron_rmipo.objectives.options import LABEL_SMOOTHING_HELP, check_number


@dataclasses.dataclass(frozen=True)
class AotPairConfig(BetaConfig):
    """Options of ``aot_pair``.

    Raises:
        ValueError: an option is outside its range.
    """

    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)


class AotPair(Objective):
    """``L = mean over ranks k of f(a_(k) - b_(k))``, ``f(d) = -(1 - e) logsigmoid(beta d) - e logsigmoid(-beta d)``.

    ``a = Lw - Rw`` and ``b = Ll - Rl`` are the log-ratios of the chosen and of the rejected responses of the global batch, sums
    under the policy and the reference, ``(k)`` is the k-th smallest, ``e`` the option ``label_smoothing``.

    A term joins a chosen response with the rejected one of its rank, in general of another pair. Each pair's loss has the two
    terms that its own responses are in, each at half its value and with the whole of its gradient in the pair's own response: the
    values of the pairs then have the mean ``L``, and their gradients add up to its gradient. A batch of one pair is DPO.

    Rewards: ``beta (L - R)``.

    Source: AOT (Melnyk et al. 2024, arXiv 2406.05882), its unpaired form; TRL sorts within a micro-batch.
    """

    name: ClassVar[str] = "aot_pair"
    Config: ClassVar[type] = AotPairConfig
    config: AotPairConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, and the whole batch before its losses."""
        return LogpNeeds(reference=True, batch=True)

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """For each pair the log-ratio at the rank of its own: ``rejected_at_rank`` of its ``a``, ``chosen_at_rank`` of its ``b``.

        Float64 ``[P]``. Equal log-ratios are ranked in the order of the batch.
        """
        chosen, rejected = batch_log_ratios(batch)
        by_chosen, by_rejected = chosen.argsort(stable=True), rejected.argsort(stable=True)
        rejected_at_rank, chosen_at_rank = torch.empty_like(rejected), torch.empty_like(chosen)
        rejected_at_rank[by_chosen] = rejected[by_rejected]
        chosen_at_rank[by_rejected] = chosen[by_chosen]
        return {"rejected_at_rank": rejected_at_rank, "chosen_at_rank": chosen_at_rank}

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen, rejected = reference_log_ratios(logps)
        other_rejected = logps.batch["rejected_at_rank"].to(chosen)
        other_chosen = logps.batch["chosen_at_rank"].to(rejected)
        terms = smoothed_log_sigmoid_loss(config.beta * (chosen - other_rejected), config.label_smoothing)
        terms = terms + smoothed_log_sigmoid_loss(config.beta * (other_chosen - rejected), config.label_smoothing)
        metrics = reward_metrics(config.beta * chosen, config.beta * rejected)
        metrics["aot/accuracies"] = (chosen > other_rejected).to(chosen.dtype)
        return LossOutput(losses=terms - 0.5 * terms.detach(), metrics=metrics, distributions=("rewards/margins",))
