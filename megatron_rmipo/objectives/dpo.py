"""DPO: rewards are log-ratios with a reference, compared by the logistic loss.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from megatron_rmipo.objectives.base import (
    LogpNeeds,
    LossOutput,
    Objective,
    PairLogps,
    reward_metrics,
    smoothed_log_sigmoid_loss,
)
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.options import (
    BETA_HELP,
    LABEL_SMOOTHING_HELP,
    LOG_RATIO_NORMALIZATION_HELP,
    check_choice,
    check_number,
)
from megatron_rmipo.objectives.pair_columns import (
    PAIR_BETA_HELP,
    PAIR_MARGIN_HELP,
    beta_of,
    columns_read,
    margin_of,
    settle_pair_columns,
)

DEFAULT_BETA = 0.1


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Options of ``dpo``. ``beta`` stays None where each pair has its own.

    Raises:
        ValueError: an option is outside its range, or is set although another one makes it meaningless.
    """

    beta: float | None = dataclasses.field(default=None, metadata={"help": f"{BETA_HELP} (default {DEFAULT_BETA:g})"})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})
    log_ratio_normalization: Literal["sum", "mean"] = dataclasses.field(
        default="sum", metadata={"help": LOG_RATIO_NORMALIZATION_HELP}
    )
    pair_margin: bool = dataclasses.field(default=False, metadata={"help": PAIR_MARGIN_HELP})
    pair_beta: bool = dataclasses.field(default=False, metadata={"help": PAIR_BETA_HELP})

    def __post_init__(self) -> None:
        settle_pair_columns(self, DEFAULT_BETA)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_choice("log_ratio_normalization", self.log_ratio_normalization, ("sum", "mean"))


class Dpo(Objective):
    """``L = -logsigmoid(beta ((Lw - Rw) - (Ll - Rl)))``, ``L`` and ``R`` sums under the policy and the reference.

    With ``log_ratio_normalization`` ``mean``, length-normalized DPO, each ``L - R`` is divided by the response's number of scored
    tokens. Rewards: ``beta (L - R)`` in the normalization chosen. With ``pair_margin`` the pair's margin is subtracted from their
    difference; with ``pair_beta`` the pair's beta stands in the place of ``beta``.

    Source: DPO (Rafailov et al. 2023), equation 7; label smoothing: its conservative form (Mitchell 2023); a margin per pair: the
    offset of ODPO (Amini et al. 2024).
    """

    name: ClassVar[str] = "dpo"
    Config: ClassVar[type] = DpoConfig
    config: DpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, and what the options read of the data."""
        return LogpNeeds(reference=True, columns=columns_read(self.config))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        beta = beta_of(self.config, logps)
        chosen, rejected = reference_log_ratios(logps, self.config.log_ratio_normalization)
        logits = beta * (chosen - rejected) - margin_of(self.config, logps)
        losses = smoothed_log_sigmoid_loss(logits, self.config.label_smoothing)
        metrics = reward_metrics(beta * chosen, beta * rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
