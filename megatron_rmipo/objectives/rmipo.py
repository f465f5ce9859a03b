"""RMiPO: SimPO's reward with a margin per pair, modulated by how much of the preference the prompt explains.

Notation: ``Lw, Ll`` sum log p(y | x) of the chosen and rejected response, ``Uw, Ul`` sum log p(y) of the response alone, ``bar``
the mean per scored token, ``dpmi`` the difference in pointwise mutual information with the prompt.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

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
    LABEL_SMOOTHING_HELP,
    LENGTH_NORMALIZATION_HELP,
    SFT_WEIGHT_HELP,
    check_choice,
    check_number,
    check_switch,
)
from megatron_rmipo.objectives.presets import fill_option, preset_defaults, refuse_option, settle_preset
from megatron_rmipo.objectives.sft import chosen_nll

MarginScale = Literal["gamma", "beta_gamma"]
PmiNormalization = Literal["sum", "mean"]
UnconditionalContext = Literal["bos", "none"]
MarginSchedule = Literal["exponential", "linear", "cosine", "none"]

PRESETS: dict[str, dict[str, object]] = {
    # The margin as printed, mutual information per token: what the paper's figures show. The default.
    "per_token": {"margin_scale": "gamma", "pmi_normalization": "mean", "unconditional_context": "bos"},
    # As printed in the paper: equation 8 and appendix C.
    "paper": {"margin_scale": "gamma", "pmi_normalization": "sum", "unconditional_context": "bos"},
    # What the authors' released trainer computes.
    "official": {"margin_scale": "beta_gamma", "pmi_normalization": "mean", "unconditional_context": "none"},
}
DEFAULT_GAMMA_MIN = 0.3
DEFAULT_GAMMA_MAX = 1.6
# A margin this near to a bound is at it.
AT_BOUND = 0.01
# Of the pairs with dpmi > 0, the share with a margin at a bound beyond which the margin tells no more than dpmi's sign.
_MOST_AT_BOUNDS = 0.8


@dataclasses.dataclass(frozen=True)
class RmipoConfig:
    """Options of ``rmipo``. Those left None are filled in where they mean something; the others stay None.

    Raises:
        ValueError: an option is outside its range, or is set although another one makes it meaningless.
    """

    preset: Literal["per_token", "paper", "official"] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "per_token (default): the paper's margin from mutual information per token; paper: as printed, of whole "
            "responses; official: as the authors' trainer computes it. Fills the switches left unset"
        },
    )
    margin_scale: MarginScale | None = dataclasses.field(
        default=None,
        metadata={
            "help": "subtracted from the reward difference: gamma (per_token, paper) or beta_gamma, beta * gamma (official)"
        },
    )
    pmi_normalization: PmiNormalization | None = dataclasses.field(
        default=None,
        metadata={
            "help": "mutual information per token, mean (presets per_token, official), or of a whole response, sum (paper)"
        },
    )
    unconditional_context: UnconditionalContext | None = dataclasses.field(
        default=None,
        metadata={
            "help": "before y in log p(y): bos (presets per_token, paper), the BOS or the token that starts every "
            "conversation; or none, leaving y's first token unscored (official)"
        },
    )
    beta: float = dataclasses.field(default=2.0, metadata={"help": BETA_HELP})
    gamma_min: float | None = dataclasses.field(
        default=None,
        metadata={"help": f"smallest margin, of pairs the prompt tells apart clearly (default {DEFAULT_GAMMA_MIN:g})"},
    )
    gamma_max: float | None = dataclasses.field(
        default=None,
        metadata={"help": f"largest margin, of pairs with dpmi <= 0; of all with schedule none (default {DEFAULT_GAMMA_MAX:g})"},
    )
    margin_schedule: MarginSchedule = dataclasses.field(
        default="exponential",
        metadata={"help": "how the margin falls from gamma_max to gamma_min; none: gamma_max for every pair"},
    )
    margin_signal: Literal["pmi", "gap"] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "what moves the margin: pmi (default), or gap, the difference in mean log-probability, without log p(y)"
        },
    )
    length_normalization: bool = dataclasses.field(default=True, metadata={"help": LENGTH_NORMALIZATION_HELP})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"help": LABEL_SMOOTHING_HELP})
    sft_weight: float = dataclasses.field(default=0.0, metadata={"help": SFT_WEIGHT_HELP})

    def __post_init__(self) -> None:
        check_choice("margin_schedule", self.margin_schedule, ("exponential", "linear", "cosine", "none"))
        check_number("beta", self.beta, low=0.0, low_is_valid=False)
        check_switch("length_normalization", self.length_normalization)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        check_number("sft_weight", self.sft_weight, low=0.0)
        fill_option(self, "margin_scale", preset_defaults(self, PRESETS)["margin_scale"])
        check_choice("margin_scale", self.margin_scale, ("gamma", "beta_gamma"))
        self._fill_bounds()
        self._fill_signal()
        settle_preset(self, PRESETS)

    def _fill_bounds(self) -> None:
        low_default, high_default = (" (the default)" if bound is None else "" for bound in (self.gamma_min, self.gamma_max))
        fill_option(self, "gamma_max", DEFAULT_GAMMA_MAX)
        check_number("gamma_max", self.gamma_max, low=0.0)
        if self.margin_schedule == "none":
            refuse_option(self, "gamma_min", "margin_schedule none gives every pair the margin gamma_max")
            return
        fill_option(self, "gamma_min", DEFAULT_GAMMA_MIN)
        check_number("gamma_min", self.gamma_min, low=0.0)
        if self.gamma_min > self.gamma_max:  # type: ignore[operator]
            raise ValueError(
                f"gamma_min {self.gamma_min:g}{low_default} is greater than gamma_max {self.gamma_max:g}{high_default}; "
                "change one of them"
            )
        if self.gamma_min == self.gamma_max:
            raise ValueError(
                f"gamma_min {self.gamma_min:g}{low_default} equal to gamma_max leaves the margin nothing to move between; "
                f"for one margin for all pairs give margin_schedule none and gamma_max {self.gamma_max:g} alone"
            )

    def _fill_signal(self) -> None:
        if self.margin_schedule == "none":
            refuse_option(self, "margin_signal", "margin_schedule none gives every pair the same margin")
        else:
            fill_option(self, "margin_signal", "pmi")
            check_choice("margin_signal", self.margin_signal, ("pmi", "gap"))
        if self.margin_signal == "pmi":
            preset = preset_defaults(self, PRESETS)
            fill_option(self, "pmi_normalization", preset["pmi_normalization"])
            check_choice("pmi_normalization", self.pmi_normalization, ("sum", "mean"))
            fill_option(self, "unconditional_context", preset["unconditional_context"])
            check_choice("unconditional_context", self.unconditional_context, ("bos", "none"))
        else:
            reason = f"no mutual information is computed with margin_{'signal gap' if self.margin_signal else 'schedule none'}"
            refuse_option(self, "pmi_normalization", reason)
            refuse_option(self, "unconditional_context", reason)


class Rmipo(Objective):
    """``L = -logsigmoid(beta (bar Lw - bar Ll) - gamma(dpmi))``, no gradient through ``gamma``.

    Preset ``per_token``: ``dpmi = (bar Lw - bar Uw) - (bar Ll - bar Ul)``. Preset ``paper``: ``dpmi = (Lw - Uw) - (Ll - Ul)``.
    Preset ``official``: as ``per_token``, but the first token of each response unscored in ``U``, and ``beta * gamma`` in place
    of ``gamma``. The metric ``gamma`` is always the margin before that factor, so that it lies between ``gamma_min`` and
    ``gamma_max`` in all. ``gamma/at_min`` and ``gamma/at_max`` are 1 for a pair whose margin is within 0.01 of that bound.

    ``gamma(dpmi) = gamma_min + (gamma_max - gamma_min) w`` with, for ``r = max(0, dpmi)`` and ``m = min(r, 1)``, the schedule
    ``exponential`` ``w = exp(-r)``, ``linear`` ``w = 1 - m``, ``cosine`` ``w = (1 + cos(pi m)) / 2``, ``none`` ``w = 1``. With
    ``margin_signal`` ``gap`` ``bar Lw - bar Ll`` stands in place of ``dpmi``.

    A response of which no token is scored in ``U`` (one token, context ``none``) tells nothing about the prompt: its mutual
    information counts as 0, where the authors' code divides 0 by 0.

    Source: RMiPO (arXiv 2604.24804) section 3.2 and appendix C; schedules: its table 7.
    """

    name: ClassVar[str] = "rmipo"
    Config: ClassVar[type] = RmipoConfig
    config: RmipoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The unconditional pass in the chosen context, or none when the margin does not depend on mutual information."""
        return LogpNeeds(unconditional=self.config.unconditional_context)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        config = self.config
        chosen_mean = logps.chosen_logps / logps.chosen_lengths
        rejected_mean = logps.rejected_logps / logps.rejected_lengths
        if config.length_normalization:
            chosen_rewards, rejected_rewards = config.beta * chosen_mean, config.beta * rejected_mean
        else:
            chosen_rewards, rejected_rewards = config.beta * logps.chosen_logps, config.beta * logps.rejected_logps
        metrics = reward_metrics(chosen_rewards, rejected_rewards)
        with torch.no_grad():
            if config.margin_signal == "pmi":
                signal = self._pmi_difference(logps)
                metrics["dpmi"] = signal
            else:
                signal = chosen_mean - rejected_mean
            gamma = self.target_margin(signal)
        margin = config.beta * gamma if config.margin_scale == "beta_gamma" else gamma
        losses = smoothed_log_sigmoid_loss(chosen_rewards - rejected_rewards - margin, config.label_smoothing)
        if config.sft_weight > 0.0:
            losses = losses + config.sft_weight * chosen_nll(logps)
        metrics["gamma"] = gamma
        if config.gamma_min is not None and config.gamma_max is not None:
            metrics["gamma/at_min"] = (gamma <= config.gamma_min + AT_BOUND).float()
            metrics["gamma/at_max"] = (gamma >= config.gamma_max - AT_BOUND).float()
        distributions = tuple(name for name in ("gamma", "dpmi", "rewards/margins") if name in metrics)
        return LossOutput(losses=losses, metrics=metrics, distributions=distributions)

    def remark(self, metrics: Mapping[str, Tensor]) -> str | None:
        """Says so where most margins of the pairs with ``dpmi > 0`` are at a bound, and which option moves them off it."""
        if "dpmi" not in metrics:
            return None
        positive = metrics["dpmi"] > 0.0
        num_positive = int(positive.sum())
        is_at_min, is_at_max = (positive & (metrics[f"gamma/at_{bound}"] > 0.0) for bound in ("min", "max"))
        if int((is_at_min | is_at_max).sum()) <= _MOST_AT_BOUNDS * num_positive:
            return None
        at_min, at_max = int(is_at_min.sum()), int(is_at_max.sum())
        config = self.config
        return (
            f"target margins: of {num_positive} pairs with dpmi > 0, {at_min} have gamma at gamma_min {config.gamma_min:g} and "
            f"{at_max} at gamma_max {config.gamma_max:g} (within {AT_BOUND:g}): it tells little more than the sign of dpmi. "
            + self._remedy(at_min > at_max)
        )

    def _remedy(self, at_min: bool) -> str:
        """What to change where margins sit at a bound, mostly at ``gamma_min`` or mostly at ``gamma_max``."""
        if self.config.pmi_normalization == "sum":
            return "dpmi is of whole responses; --preset per_token (--pmi-normalization mean) takes it per token"
        if not at_min:
            return "The prompt hardly tells the responses apart; if that stays, --margin-schedule none trains the same for less"
        if self.config.margin_schedule == "exponential":
            return "dpmi is beyond what the schedule spreads; --margin-signal gap follows a smaller difference"
        return "--margin-schedule exponential falls more slowly"

    def _pmi_difference(self, logps: PairLogps) -> Tensor:
        """``pmi(chosen) - pmi(rejected)``, ``[P]``."""
        assert logps.uncond_chosen_logps is not None
        assert logps.uncond_rejected_logps is not None
        assert logps.uncond_chosen_lengths is not None
        assert logps.uncond_rejected_lengths is not None
        chosen = self._pmi(logps.chosen_logps, logps.chosen_lengths, logps.uncond_chosen_logps, logps.uncond_chosen_lengths)
        rejected = self._pmi(
            logps.rejected_logps, logps.rejected_lengths, logps.uncond_rejected_logps, logps.uncond_rejected_lengths
        )
        return chosen - rejected

    def _pmi(self, logps: Tensor, lengths: Tensor, uncond_logps: Tensor, uncond_lengths: Tensor) -> Tensor:
        """``log p(y | x) - log p(y)``, of the response or per token, ``[P]``; 0 where no token of ``log p(y)`` is scored."""
        if self.config.pmi_normalization == "mean":
            logps, uncond_logps = logps / lengths, uncond_logps / uncond_lengths
        pmi = logps - uncond_logps
        return torch.where(uncond_lengths > 0, pmi, torch.zeros_like(pmi))

    def target_margin(self, signal: Tensor) -> Tensor:
        """``gamma`` of each pair, ``[P] -> [P]``: ``gamma_max`` where the signal is at most 0, falling to ``gamma_min`` above."""
        config = self.config
        assert config.gamma_max is not None
        if config.margin_schedule == "none":
            return torch.full_like(signal, config.gamma_max)
        assert config.gamma_min is not None
        if config.margin_schedule == "exponential":
            weight = torch.exp(-signal.clamp(min=0.0))
        elif config.margin_schedule == "linear":
            weight = 1.0 - signal.clamp(min=0.0, max=1.0)
        else:
            weight = (1.0 + torch.cos(math.pi * signal.clamp(min=0.0, max=1.0))) / 2.0
        return config.gamma_min + (config.gamma_max - config.gamma_min) * weight
