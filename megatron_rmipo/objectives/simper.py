"""SimPER: the difference of inverse perplexities, without a hyperparameter.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.options import check_switch


@dataclasses.dataclass(frozen=True)
class SimperConfig:
    """Options of ``simper``.

    Raises:
        ValueError: an option is not valid.
    """

    length_normalization: bool = dataclasses.field(
        default=True,
        metadata={"help": "compare inverse perplexities, exp(mean log-probability per token); off: probabilities, exp(sum)"},
    )

    def __post_init__(self) -> None:
        check_switch("length_normalization", self.length_normalization)


class Simper(Objective):
    """``L = exp(bar Ll) - exp(bar Lw)``, ``bar L`` the mean log-probability per token.

    Without length normalisation ``L``, the sum, stands in place of ``bar L``: the probability of a whole response, which is 0 in
    fp32, with a gradient of 0, once the sum is below -103, and hardly more before.

    Rewards: ``bar L`` (``L``), as the authors' trainer reports them; the exponentials that the loss compares are the metrics
    ``likelihood/chosen`` and ``likelihood/rejected``.

    Source: SimPER (Xiao et al. 2025).
    """

    name: ClassVar[str] = "simper"
    Config: ClassVar[type] = SimperConfig
    config: SimperConfig

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen, rejected = logps.chosen_logps, logps.rejected_logps
        if self.config.length_normalization:
            chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        likely_chosen, likely_rejected = chosen.exp(), rejected.exp()
        metrics = reward_metrics(chosen, rejected)
        metrics |= {"likelihood/chosen": likely_chosen.detach(), "likelihood/rejected": likely_rejected.detach()}
        return LossOutput(losses=likely_rejected - likely_chosen, metrics=metrics, distributions=("rewards/margins",))
