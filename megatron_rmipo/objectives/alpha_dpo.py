"""alpha-DPO: SimPO's reward with a margin that is larger for pairs the policy has already told apart better than the reference.

Notation: ``Lw, Ll`` sum log p(y | x) of the chosen and rejected response, ``Rw, Rl`` the same under the reference, ``bar`` the
mean per scored token, ``x = bar Lw - bar Ll``.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

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
from megatron_rmipo.objectives.batch_statistics import (
    EMA_BIAS_CORRECTION_HELP,
    MEAN_SPREAD_FLOOR,
    SUM_SPREAD_FLOOR,
    advanced_averages,
    averages_in_use,
    initial_averages,
    mean_and_spread,
    reference_gaps,
    updated_averages,
    z_scores,
)
from megatron_rmipo.objectives.options import (
    BETA_HELP,
    GAMMA_BETA_RATIO_HELP,
    LABEL_SMOOTHING_HELP,
    LENGTH_NORMALIZATION_HELP,
    check_choice,
    check_number,
    check_switch,
)
from megatron_rmipo.objectives.presets import fill_option, preset_defaults, refuse_option, settle_preset

PRESETS: dict[str, dict[str, object]] = {
    # As printed in the paper. The bias correction, which it does not speak of, is for those who set gap_statistics ema.
    "paper": {"z_scale": "alpha", "gap_normalization": "sum", "gap_statistics": "batch", "ema_bias_correction": True},
    # What the authors' released trainer computes.
    "official": {"z_scale": "beta_alpha", "gap_normalization": "mean", "gap_statistics": "ema", "ema_bias_correction": False},
}


@dataclasses.dataclass(frozen=True)
class AlphaDpoConfig:
    """Options of ``alpha_dpo``. Those left None are filled in where they mean something; the others stay None.

    Raises:
        ValueError: an option is outside its range, or is set although another one makes it meaningless.
    """

    preset: Literal["paper", "official"] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "paper (default): as printed; official: as the authors' trainer computes it. Fills the switches left unset"
        },
    )
    z_scale: Literal["alpha", "beta_alpha"] | None = dataclasses.field(
        default=None,
        metadata={"help": "times z, in the margin: alpha (preset paper) or beta_alpha, beta * alpha (official)"},
    )
    gap_normalization: Literal["sum", "mean"] | None = dataclasses.field(
        default=None,
        metadata={"help": "gap whose z-score is taken: of whole responses, sum (preset paper), or per token, mean (official)"},
    )
    gap_statistics: Literal["batch", "ema"] | None = dataclasses.field(
        default=None,
        metadata={"help": "mean and spread of the gaps: of this batch (preset paper), or ema, moving averages (official)"},
    )
    ema_bias_correction: bool | None = dataclasses.field(
        default=None, metadata={"help": f"{EMA_BIAS_CORRECTION_HELP} (gap_statistics ema alone; preset paper: on, official: off)"}
    )
    beta: float = dataclasses.field(default=2.5, metadata={"help": BETA_HELP})
    alpha: float = dataclasses.field(default=0.1, metadata={"help": "weight of z in the margin"})
    gamma_beta_ratio: float = dataclasses.field(default=0.3, metadata={"help": GAMMA_BETA_RATIO_HELP})
    length_normalization: bool = dataclasses.field(default=True, metadata={"help": LENGTH_NORMALIZATION_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_number("alpha", self.alpha, low=0.0)
        if self.alpha == 0.0:
            raise ValueError("alpha 0 is SimPO at the cost of a reference and another pass; use objective simpo")
        check_number("gamma_beta_ratio", self.gamma_beta_ratio, low=0.0)
        check_switch("length_normalization", self.length_normalization)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        self._fill_switches()
        settle_preset(self, PRESETS)

    def _fill_switches(self) -> None:
        preset = preset_defaults(self, PRESETS)
        fill_option(self, "z_scale", preset["z_scale"])
        check_choice("z_scale", self.z_scale, ("alpha", "beta_alpha"))
        fill_option(self, "gap_statistics", preset["gap_statistics"])
        check_choice("gap_statistics", self.gap_statistics, ("batch", "ema"))
        if self.length_normalization:
            fill_option(self, "gap_normalization", preset["gap_normalization"])
            check_choice("gap_normalization", self.gap_normalization, ("sum", "mean"))
        else:
            refuse_option(self, "gap_normalization", "length_normalization off takes the gap on sums as well")
        if self.gap_statistics == "ema":
            fill_option(self, "ema_bias_correction", preset["ema_bias_correction"])
            check_switch("ema_bias_correction", self.ema_bias_correction)
        else:
            refuse_option(self, "ema_bias_correction", "gap_statistics batch has no moving average")


class AlphaDpo(Objective):
    """``L = -logsigmoid(beta x - gamma - s z)``, no gradient through ``z``, ``gamma = beta * gamma_beta_ratio``.

    Preset ``paper``: ``s = alpha``; ``z`` is the z-score of ``(Lw - Rw) - (Ll - Rl)`` in its global batch. Preset ``official``:
    ``s = beta * alpha``; ``z`` is that of ``(bar Lw - bar Rw) - (bar Ll - bar Rl)`` against moving averages (decay 0.9) of the
    batches' mean and unbiased standard deviation, this batch included, which start at zero without correction: the z-scores of a
    first batch come out about ten times too large (its spread counts a tenth). ``ema_bias_correction`` on divides the averages by
    the weight they have gathered.

    ``paper`` is the default because a batch's loss then depends on that batch and the weights alone, and no state is carried.

    ``z`` is 0 where nothing spreads: the policy equals the reference, a batch of one pair. A spread below a floor counts as the
    floor (0.1 nat on sums, 0.001 per token), so that rounding alone does not make margins.

    Without length normalisation ``x`` and the gap are on sums. Rewards are ``beta * bar L`` (``beta * L``); the metric ``gamma``
    is the whole margin that ``beta x`` is measured against, in both presets.

    Source: alpha-DPO (Wu et al. 2025, arXiv 2410.10148); preset ``official`` its released trainer.
    """

    name: ClassVar[str] = "alpha_dpo"
    Config: ClassVar[type] = AlphaDpoConfig
    config: AlphaDpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, and the whole batch before its losses."""
        return LogpNeeds(reference=True, batch=True)

    def initial_state(self) -> State:
        """Moving averages of nothing yet; nothing at all with statistics of the batch."""
        return initial_averages() if self.config.gap_statistics == "ema" else {}

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``gap`` and ``z``, float64 ``[P]``; the moving averages with this batch in them."""
        per_token = self.config.gap_normalization == "mean"
        floor = MEAN_SPREAD_FLOOR if per_token else SUM_SPREAD_FLOOR
        gaps = reference_gaps(batch, per_token=per_token)
        updated: dict[str, Tensor] = {}
        if self.config.gap_statistics == "ema":
            updated = updated_averages(state, gaps)
            mean, spread = averages_in_use(state, updated, bias_correction=self.config.ema_bias_correction is True)
        else:
            mean, spread = mean_and_spread(gaps)
        return {"gap": gaps, "z": z_scores(gaps, mean, spread, floor), **updated}

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """The moving averages with the step's batch in them."""
        return advanced_averages(state, prepared) if self.config.gap_statistics == "ema" else state

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen, rejected = logps.chosen_logps, logps.rejected_logps
        if config.length_normalization:
            chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        z = logps.batch["z"].to(chosen)
        scale = config.beta * config.alpha if config.z_scale == "beta_alpha" else config.alpha
        gamma = config.beta * config.gamma_beta_ratio + scale * z
        losses = smoothed_log_sigmoid_loss(config.beta * (chosen - rejected) - gamma, config.label_smoothing)
        metrics = reward_metrics(config.beta * chosen, config.beta * rejected)
        metrics["gamma"] = gamma
        metrics["gap"] = logps.batch["gap"].to(chosen)
        metrics["alpha_dpo/z"] = z
        return LossOutput(losses=losses, metrics=metrics, distributions=("gamma", "gap", "rewards/margins"))
