"""InfoPO (experimental): mutual information of prompt and chosen response, without a Bradley-Terry model.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.bounded_exp import bounded_exp
from megatron_rmipo.objectives.log_ratios import reference_log_ratios


@dataclasses.dataclass(frozen=True)
class InfopoConfig:
    """The ``infopo`` objective has no options."""


class Infopo(Objective):
    """Experimental: ``L = -(Lw - Rw) + exp(Ll - Rl)``, derived from the abstract of the paper alone.

    The paper's own equation was not at hand, so this may not be what its authors train with. It is the NWJ lower bound on mutual
    information, ``E_joint[f] - E_marginals[exp(f - 1)]``, negated, up to a constant, with ``f`` = 1 + the log-ratio of policy and
    reference, the chosen responses as samples of the joint distribution and the rejected ones of the marginals. It has what the
    abstract claims: no Bradley-Terry model, and a term that raises the likelihood of the chosen response at a constant rate.

    ``exp`` of a sum over a long response leaves fp32: where ``Ll - Rl > 30`` it is continued by its tangent, so that loss and
    gradient stay finite and still push the rejected response down. Up to there the loss is the formula.

    Rewards: ``L - R``.

    Source: InfoPO (Xiao et al. 2025), abstract; the bound: Nguyen, Wainwright, Jordan 2010.
    """

    name: ClassVar[str] = "infopo"
    Config: ClassVar[type] = InfopoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference."""
        return LogpNeeds(reference=True)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen, rejected = reference_log_ratios(logps)
        losses = bounded_exp(rejected) - chosen
        metrics = reward_metrics(chosen, rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
