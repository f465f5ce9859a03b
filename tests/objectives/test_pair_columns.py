"""Numbers beside the pairs: margin and beta of dpo and simpo, and the weight of any objective's losses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds, PairLogps
from megatron_rmipo.objectives.pair_weight import PairWeighted
from megatron_rmipo.objectives.registry import build_objective
from tests.objectives.batches import with_prepared
from tests.objectives.float64 import Numbers, check_against_float64, run_with_gradients, softplus
from tests.objectives.pairs import make_pairs, random_pairs

BASE = ("--data-path", "A", "--load-hf", "M")


def with_columns(pairs: PairLogps) -> PairLogps:
    number = torch.arange(pairs.chosen_logps.shape[0], dtype=torch.float32)
    columns = {"margin": 0.3 * (number % 5) - 0.4, "beta": 0.05 + 0.1 * (number % 7), "weight": 0.5 * (number % 4)}
    return dataclasses.replace(pairs, columns=columns)


@pytest.mark.parametrize(
    ("name", "options", "loss", "margin"),
    [
        # h = (-6 + 7) - (-10 + 9) = 2; the margin 0.5, the beta 0.25
        ("dpo", {"pair_margin": True}, softplus(-(0.1 * 2.0 - 0.5)), 0.2),
        ("dpo", {"pair_beta": True}, softplus(-0.25 * 2.0), 0.5),
        ("dpo", {"pair_margin": True, "pair_beta": True, "label_smoothing": 0.5}, 0.5 * (softplus(0.0) + softplus(0.0)), 0.5),
        # bar Lw - bar Ll = 0.5; the objective's own margin is a quarter of the beta
        ("simpo", {"pair_margin": True}, softplus(-(2.0 * 0.5 - 0.5 - 0.5)), 1.0),
        ("simpo", {"pair_beta": True}, softplus(-0.25 * (0.5 - 0.25)), 0.125),
    ],
)
def test_hand_worked_pair(name: str, options: dict[str, Any], loss: float, margin: float) -> None:
    pairs = make_pairs([-6.0], [-10.0], ([3], [4]), ref=([-7.0], [-9.0]))
    pairs = dataclasses.replace(pairs, columns={"margin": torch.tensor([0.5]), "beta": torch.tensor([0.25])})
    output = build_objective(name, options)(pairs)
    assert output.losses.item() == pytest.approx(loss, rel=1e-6)
    # The rewards are the policy's; what they are measured against does not show in them.
    assert output.metrics["rewards/margins"].item() == pytest.approx(margin, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("dpo", lambda n, beta, margin: torch.log1p(torch.exp(margin - beta * n.h))),
        ("simpo", lambda n, beta, margin: torch.log1p(torch.exp(margin - beta * (n.bar_lw - n.bar_ll - 0.25)))),
    ],
)
def test_losses_and_gradients_agree_with_float64(name: str, formula: Callable[[Numbers, Tensor, Tensor], Tensor]) -> None:
    pairs = with_columns(random_pairs(23, seed=61))
    beta, margin = (pairs.columns[column].double() for column in ("beta", "margin"))
    objective = build_objective(name, {"pair_margin": True, "pair_beta": True})
    assert objective.needs == LogpNeeds(reference=name == "dpo", columns=("margin", "beta"))
    check_against_float64(objective, pairs, lambda n: formula(n, beta, margin))


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.1), ("simpo", 2.0)])
def test_columns_that_say_the_usual_change_nothing(name: str, beta: float) -> None:
    pairs = random_pairs(11, seed=62)
    usual = {"margin": torch.zeros(11), "beta": torch.full((11,), beta)}
    read = build_objective(name, {"pair_margin": True, "pair_beta": True})(dataclasses.replace(pairs, columns=usual))
    assert torch.equal(read.losses, build_objective(name, {})(pairs).losses)


@pytest.mark.parametrize("name", ["dpo", "sft", "beta_dpo", "dpo:0.8,sft:0.2"])
def test_weights_multiply_losses_and_their_gradients_alone(name: str) -> None:
    objective = build_objective(name, {})
    pairs = with_columns(with_prepared(objective, random_pairs(13, seed=63)))
    weighted = PairWeighted(objective)
    assert weighted.needs == dataclasses.replace(objective.needs, columns=("weight",))
    assert (weighted.name, weighted.initial_state(), weighted.parts) == (name, objective.initial_state(), objective.parts)
    (plain, *gradients), (output, *of_weighted) = (run_with_gradients(one, pairs) for one in (objective, weighted))
    weights = pairs.columns["weight"]
    assert weights.min() == 0.0
    torch.testing.assert_close(output.losses, weights * plain.losses)
    for gradient, found in zip(gradients, of_weighted, strict=True):
        torch.testing.assert_close(found, weights * gradient)
    assert output.metrics.keys() == plain.metrics.keys()
    assert all(torch.equal(values, plain.metrics[metric]) for metric, values in output.metrics.items())


def test_the_switch_reaches_every_objective() -> None:
    for name in ("rmipo", "kto", "dpo,sft"):
        objective = objective_of(parse_arguments([*BASE, "--objective", name, "--pair-weight"]))
        assert objective.needs.columns == ("weight",)
    mixture = objective_of(parse_arguments([*BASE, "--objective", "dpo,simpo", "--dpo-pair-margin", "--simpo-pair-beta"]))
    assert mixture.needs == LogpNeeds(reference=True, columns=("margin", "beta"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("epsilon_dpo", "--pair-margin"),
            "--pair-margin: --objective epsilon_dpo has no such option (it is one of: dpo, simpo)",
        ),
        (("dpo", "--pair-beta", "--beta", "0.2"), "beta 0.2 would do nothing: pair_beta takes each pair's beta from the data"),
        (("dpo", "--beta", "0"), "beta must be a number greater than 0, not 0.0"),
    ],
)
def test_what_would_do_nothing_is_refused(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_arguments([*BASE, "--objective", *argv])
