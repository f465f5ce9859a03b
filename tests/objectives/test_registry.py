"""Names and options: what is known, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.objectives.rmipo import Rmipo
from tests.objectives.pairs import random_pairs


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_built_by_name(name: str) -> None:
    objective = build_objective(name, {})
    assert type(objective) is OBJECTIVES[name]
    assert objective.name == name


def needs_no_preparation(name: str) -> bool:
    needs = build_objective(name, {}).needs
    return not (needs.batch or needs.mismatched or needs.perturbation is not None)


# Those that see the global batch first are run by their own tests.
@pytest.mark.parametrize("name", sorted(filter(needs_no_preparation, OBJECTIVES)))
def test_every_objective_gives_finite_losses_and_metrics_of_pairs(name: str) -> None:
    output = build_objective(name, {})(random_pairs(7, seed=0))
    assert output.losses.shape == (7,)
    assert output.losses.isfinite().all()
    assert set(output.distributions) <= set(output.metrics)
    assert all(metric.shape == (7,) for metric in output.metrics.values())
    assert name == "sft" or {f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")} <= set(output.metrics)


def test_an_option_is_of_one_kind_in_every_objective_that_has_it() -> None:
    kinds: dict[str, set[str]] = {}
    for objective in OBJECTIVES.values():
        for field in dataclasses.fields(objective.Config):
            kinds.setdefault(field.name, set()).add(str(field.type).removesuffix(" | None"))
    assert {name: types for name, types in kinds.items() if len(types) > 1} == {}


def test_unset_options_fall_back_and_set_ones_arrive() -> None:
    objective = build_objective("rmipo", {"beta": 3.0, "sft_weight": None, "preset": "official"})
    assert (objective.config.beta, objective.config.sft_weight, objective.config.margin_scale) == (3.0, 0.0, "beta_gamma")


def test_an_objective_of_ones_own_is_built_from_module_and_class() -> None:
    assert isinstance(build_objective("megatron_rmipo.objectives.rmipo:Rmipo", {"beta": 1.5}), Rmipo)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("rmpo", {}, ["'rmpo'", "did you mean 'rmipo'", "simpo"]),
        ("zzz", {}, ["'zzz'.", "rmipo, simpo, simper, dpo"]),
        ("simpo", {"gamma_min": 0.3}, ["'simpo'", "gamma_min", "0.3", "rmipo would", "gamma_beta_ratio"]),
        ("rmipo", {"gamma_beta_ratio": 0.5}, ["gamma_beta_ratio", "simpo, alpha_dpo, alpha_po would", "gamma_max"]),
        ("rmipo", {"gama_min": 0.5}, ["gama_min", "did you mean gamma_min"]),
        ("sft", {"beta": 2.0}, ["'sft'", "beta", "no options"]),
        ("no.such.module:Loss", {}, ["cannot be imported", "no.such"]),
        ("megatron_rmipo.objectives.rmipo:Nothing", {}, ["cannot be imported", "Nothing"]),
        ("megatron_rmipo.objectives.base:PairLogps", {}, ["not a subclass"]),
    ],
)
def test_refusals_name_the_remedy(name: str, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        build_objective(name, options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_option_has_a_line_of_help(name: str) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(OBJECTIVES[name].Config))


def test_needs_follow_the_options() -> None:
    assert build_objective("rmipo", {}).needs == LogpNeeds(unconditional="bos")
    assert build_objective("rmipo", {"preset": "official"}).needs == LogpNeeds(unconditional="none")
    assert build_objective("rmipo", {"margin_signal": "gap"}).needs == LogpNeeds()
    assert build_objective("simpo", {}).needs == LogpNeeds()
    assert build_objective("dpo", {}).needs == LogpNeeds(reference=True)
