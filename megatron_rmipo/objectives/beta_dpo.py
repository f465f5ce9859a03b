"""beta-DPO: DPO with one beta per batch, set by how far the batch's reward gaps lie from what is usual.

Notation: ``Lw, Ll`` sum log p(y | x) of the chosen and rejected response, ``Rw, Rl`` the same under the reference,
``h = (Lw - Rw) - (Ll - Rl)``, the gap.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from megatron_rmipo.objectives.batch_statistics import (
    EMA_BIAS_CORRECTION_HELP,
    SUM_SPREAD_FLOOR,
    advanced_averages,
    averages_in_use,
    initial_averages,
    reference_gaps,
    updated_averages,
    z_scores,
)
from megatron_rmipo.objectives.log_ratios import reference_log_ratios
from megatron_rmipo.objectives.options import check_number, check_switch

MIN_BETA = 1e-3


@dataclasses.dataclass(frozen=True)
class BetaDpoConfig:
    """Options of ``beta_dpo``.

    Raises:
        ValueError: an option is outside its range, or is set although another one makes it meaningless.
    """

    beta: float = dataclasses.field(default=0.1, metadata={"help": "scale of the reward of a batch with the usual gaps"})
    beta_sensitivity: float = dataclasses.field(
        default=0.6,
        metadata={"help": "relative change of beta per nat that the selected pairs' mean gap lies above the usual one"},
    )
    rho: float = dataclasses.field(
        default=0.2,
        metadata={"help": "share of the batch left out of the selection, at least 0, below 1; mostly pairs with unusual gaps"},
    )
    filter_pairs: bool = dataclasses.field(
        default=True, metadata={"help": "train on the selected pairs alone; off: on all, the selection decides beta alone"}
    )
    ema_bias_correction: bool = dataclasses.field(default=True, metadata={"help": EMA_BIAS_CORRECTION_HELP})

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=MIN_BETA)
        check_number("beta_sensitivity", self.beta_sensitivity, low=0.0)
        check_number("rho", self.rho, low=0.0, high=1.0, high_is_valid=False)
        check_switch("filter_pairs", self.filter_pairs)
        check_switch("ema_bias_correction", self.ema_bias_correction)
        if self.rho == 0.0 and not self.filter_pairs:
            raise ValueError("filter_pairs off would do nothing: rho 0 selects every pair; leave it out")
        if self.beta_sensitivity == 0.0 and (self.rho == 0.0 or not self.filter_pairs):
            reason = "rho 0" if self.rho == 0.0 else "filter_pairs off"
            raise ValueError(f"beta_sensitivity 0 with {reason} is plain DPO at the cost of another pass; use objective dpo")


class BetaDpo(Objective):
    """``L = -logsigmoid(b h)``, ``b = max(0.001, beta (1 + beta_sensitivity (M - M0)))``, no gradient through ``b``.

    ``M`` is the mean ``h`` of the batch's selected pairs, ``M0`` and ``S`` are moving averages (decay 0.9) of the mean and the
    unbiased standard deviation of ``h`` over a global batch, this batch included. Of N pairs ``N (1 - rho)``, rounded down but at
    least 1, are selected: drawn without replacement with weight ``exp(-((h - M0) / S)^2 / 2)``, by a generator seeded with the
    number of batches before, so that every rank, every layout and a resumed run draw the same.

    With ``filter_pairs`` the batch loss is the mean over the selected pairs, as in the released code; the losses of the others
    are 0. The paper's appendix describes the selection as deciding beta alone, which is ``filter_pairs`` off.

    The gaps are bare, as in the released code. Appendix A of the RMiPO paper has them times ``beta``: its alpha is a
    ``beta_sensitivity`` of ``alpha * beta``.

    Source: beta-DPO (Wu et al. 2024, arXiv 2407.08639), algorithm 1, and its released code.
    """

    name: ClassVar[str] = "beta_dpo"
    Config: ClassVar[type] = BetaDpoConfig
    config: BetaDpoConfig

    @property
    def needs(self) -> LogpNeeds:
        """The reference, and the whole batch before its losses."""
        return LogpNeeds(reference=True, batch=True)

    def initial_state(self) -> State:
        """Moving averages of nothing yet."""
        return initial_averages()

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """``beta``, ``selected`` (1 or 0) and ``weight``, which multiplies the losses; the averages with this batch in them."""
        config = self.config
        gaps = reference_gaps(batch)
        updated = updated_averages(state, gaps)
        usual, spread = averages_in_use(state, updated, bias_correction=config.ema_bias_correction)
        log_weights = -0.5 * z_scores(gaps, usual, spread, SUM_SPREAD_FLOOR).square()
        # Rounded first: 20 * (1 - 0.8) is just below 4 in floating point.
        num_selected = max(1, int(round(gaps.numel() * (1.0 - config.rho), 9)))
        selected = draw_without_replacement(log_weights, num_selected, seed=int(state["num_batches"]))
        beta = config.beta * (1.0 + config.beta_sensitivity * (gaps[selected].mean() - usual))
        prepared = {"beta": beta.clamp(min=MIN_BETA), "selected": selected.double(), **updated}
        if config.filter_pairs:
            prepared["weight"] = selected.double() * (gaps.numel() / num_selected)
        return prepared

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """The averages with the step's batch in them."""
        return advanced_averages(state, prepared)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss and metrics per pair."""
        chosen_ratios, rejected_ratios = reference_log_ratios(logps)
        gaps = chosen_ratios - rejected_ratios
        beta = logps.batch["beta"].to(gaps)
        losses = smoothed_log_sigmoid_loss(beta * gaps, 0.0)
        if self.config.filter_pairs:
            losses = losses * logps.batch["weight"].to(gaps)
        metrics = reward_metrics(beta * chosen_ratios, beta * rejected_ratios)
        metrics["beta"] = beta.expand_as(gaps).clone()
        metrics["gap"] = gaps.detach()
        metrics["selected"] = logps.batch["selected"].to(gaps)
        return LossOutput(losses=losses, metrics=metrics, distributions=("gap", "rewards/margins"))


def draw_without_replacement(log_weights: Tensor, num_drawn: int, *, seed: int) -> Tensor:
    """Which entries are drawn, one after another, each with the share its weight has among those left; bool ``[P]``.

    The entries with the largest ``log_weights`` plus Gumbel noise: the same distribution, and no weight underflows.

    Args:
        log_weights: float64 ``[P]``, on the CPU.
        num_drawn: how many, at most P.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64)
    keys = log_weights - torch.log(-torch.log(uniform))
    drawn = torch.zeros(log_weights.shape, dtype=torch.bool)
    drawn[keys.topk(num_drawn).indices] = True
    return drawn
