"""Log-ratios of policy and reference, what the rewards of the DPO family are made of, and what its losses have in common.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps, reward_metrics
from megatron_rmipo.objectives.options import BETA_HELP, check_number


def reference_log_ratios(logps: PairLogps, normalization: str = "sum") -> tuple[Tensor, Tensor]:
    """``(Lw - Rw, Ll - Rl)``: log-ratio of policy and reference of the chosen and the rejected response.

    fp32 ``[P]``, with gradient; of whole responses, or with ``normalization`` ``"mean"`` per scored token. The objective must
    declare ``reference``.
    """
    assert logps.ref_chosen_logps is not None
    assert logps.ref_rejected_logps is not None
    chosen, rejected = logps.chosen_logps - logps.ref_chosen_logps, logps.rejected_logps - logps.ref_rejected_logps
    if normalization == "mean":
        return chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
    return chosen, rejected


@dataclasses.dataclass(frozen=True)
class BetaConfig:
    """The scale of the rewards, the one option of several objectives.

    Raises:
        ValueError: it is outside its range.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": BETA_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)


class LogRatioObjective(Objective):
    """A loss of a pair's two rewards alone, ``beta (L - R)``, ``L`` and ``R`` sums under the policy and the reference.

    A subclass has an option ``beta`` and gives :meth:`losses`.
    """

    Config: ClassVar[type] = BetaConfig
    config: BetaConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference."""
        return LogpNeeds(reference=True)

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair from its rewards, fp32 ``[P]`` each, with gradient."""

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen_ratios, rejected_ratios = reference_log_ratios(logps)
        chosen, rejected = self.config.beta * chosen_ratios, self.config.beta * rejected_ratios
        metrics = reward_metrics(chosen, rejected)
        return LossOutput(losses=self.losses(chosen, rejected), metrics=metrics, distributions=("rewards/margins",))
