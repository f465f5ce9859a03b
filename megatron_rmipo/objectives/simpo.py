"""SimPO: length-normalised rewards without a reference model, against one margin for all pairs.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from megatron_rmipo.objectives.base import (
    LogpNeeds,
    LossOutput,
    Objective,
    PairLogps,
    reward_metrics,
    smoothed_log_sigmoid_loss,
)
from megatron_rmipo.objectives.options import (
    BETA_HELP,
    GAMMA_BETA_RATIO_HELP,
    LABEL_SMOOTHING_HELP,
    LENGTH_NORMALIZATION_HELP,
    SFT_WEIGHT_HELP,
    check_number,
    check_switch,
)
from megatron_rmipo.objectives.pair_columns import (
    PAIR_BETA_HELP,
    PAIR_MARGIN_HELP,
    beta_of,
    columns_read,
    margin_of,
    settle_pair_columns,
)
from megatron_rmipo.objectives.sft import chosen_nll

DEFAULT_BETA = 2.0


@dataclasses.dataclass(frozen=True)
class SimpoConfig:
    """Options of ``simpo``. ``beta`` stays None where each pair has its own.

    Raises:
        ValueError: an option is outside its range, or is set although another one makes it meaningless.
    """

    beta: float | None = dataclasses.field(default=None, metadata={"help": f"{BETA_HELP} (default {DEFAULT_BETA:g})"})
    gamma_beta_ratio: float = dataclasses.field(default=0.25, metadata={"help": GAMMA_BETA_RATIO_HELP})
    length_normalization: bool = dataclasses.field(default=True, metadata={"help": LENGTH_NORMALIZATION_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})
    sft_weight: float = dataclasses.field(default=0.0, metadata={"help": SFT_WEIGHT_HELP})
    pair_margin: bool = dataclasses.field(default=False, metadata={"help": PAIR_MARGIN_HELP})
    pair_beta: bool = dataclasses.field(default=False, metadata={"help": PAIR_BETA_HELP})

    def __post_init__(self) -> None:
        settle_pair_columns(self, DEFAULT_BETA)
        check_number("gamma_beta_ratio", self.gamma_beta_ratio, low=0.0)
        check_switch("length_normalization", self.length_normalization)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_number("sft_weight", self.sft_weight, low=0.0)


class Simpo(Objective):
    """``L = -logsigmoid(beta (bar Lw - bar Ll) - gamma)``, ``bar L`` the mean log-probability per token.

    ``gamma = beta * gamma_beta_ratio``. Without length normalisation ``L`` stands in place of ``bar L``, against the same margin.

    With ``pair_margin`` the pair's margin is subtracted as well; with ``pair_beta`` the pair's beta stands in the place of
    ``beta``, in ``gamma`` too.

    Source: SimPO (Meng et al. 2024), equation 6; label smoothing and the SFT term as in its reference code.
    """

    name: ClassVar[str] = "simpo"
    Config: ClassVar[type] = SimpoConfig
    config: SimpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """What the options read of the data."""
        return LogpNeeds(columns=columns_read(self.config))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config, beta = self.config, beta_of(self.config, logps)
        chosen, rejected = logps.chosen_logps, logps.rejected_logps
        if config.length_normalization:
            chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        logits = beta * (chosen - rejected - config.gamma_beta_ratio) - margin_of(config, logps)
        losses = smoothed_log_sigmoid_loss(logits, config.label_smoothing)
        if config.sft_weight > 0.0:
            losses = losses + config.sft_weight * chosen_nll(logps)
        metrics = reward_metrics(beta * chosen, beta * rejected)
        return LossOutput(losses=losses, metrics=metrics, distributions=("rewards/margins",))
