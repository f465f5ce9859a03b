"""Several objectives at once: the sum of what each gives alone, and options, metrics and state that do not mix."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.__main__ import main
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps
from megatron_rmipo.objectives.mixture import split_members
from megatron_rmipo.objectives.pair_weight import PairWeighted
from megatron_rmipo.objectives.registry import build_objective
from tests.objectives.batches import batch_of, cut, with_prepared
from tests.objectives.float64 import run_with_gradients
from tests.objectives.pairs import make_pairs, random_pairs

BASE = ("--data-path", "A", "--load-hf", "M")
HERE = "tests.objectives.test_mixture"


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """None."""


class Own(Objective):
    """Needs of the same kinds as registered ones, and other ones; losses of another shape where it is told to."""

    name: ClassVar[str] = "own"
    Config: ClassVar[type] = NoOptions

    @property
    def needs(self) -> LogpNeeds:
        return LogpNeeds(unconditional="none", perturbation=0.3)

    def __call__(self, logps: PairLogps) -> LossOutput:
        return LossOutput(losses=-logps.chosen_logps.mean(), metrics={})


@dataclasses.dataclass(frozen=True)
class Beta:
    """One that others have, too, and one that is called as the mixture would call another's."""

    beta: float = dataclasses.field(default=1.0, metadata={"help": "a number"})
    dpo_beta: float = dataclasses.field(default=1.0, metadata={"help": "a number"})


class Another(Own):
    """Called as its parent is."""


class Hyphen(Own):
    """No flag can be called after it."""

    name: ClassVar[str] = "my-own"
    Config: ClassVar[type] = Beta


class Twice(Own):
    """Has an option of the name that another's gets beside it."""

    name: ClassVar[str] = "twice"
    Config: ClassVar[type] = Beta


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("dpo", None),
        ("mine:Class", None),
        ("dpo,sft", [("dpo", 1.0), ("sft", 1.0)]),
        ("dpo:0.8,sft:0.2", [("dpo", 0.8), ("sft", 0.2)]),
        ("dpo:.5, mine.losses:Class , kto:2e-1", [("dpo", 0.5), ("mine.losses:Class", 1.0), ("kto", 0.2)]),
        ("mine.losses:Class:3,sft", [("mine.losses:Class", 3.0), ("sft", 1.0)]),
        ("mine:inf,sft", [("mine:inf", 1.0), ("sft", 1.0)]),  # a class may be called so
    ],
)
def test_names_and_weights(text: str, members: list[tuple[str, float]] | None) -> None:
    assert split_members(text) == members


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dpo:0.8", "a weight is one among several objectives; leave it out"),
        ("dpo:0.8,", "a name is missing; expected NAME:WEIGHT"),
        (",sft", "a name is missing"),
        ("dpo:0,sft", "the weight of dpo is 0, which is no number above 0"),
        ("dpo:-1,sft", "the weight of dpo is -1"),
        ("dpo:1e999,sft", "the weight of dpo is 1e999"),
        ("dpo:0.8x,sft", "the weight of dpo is 0.8x"),
        ("dpo,sft,dpo:2", "dpo is named 2 times; name it once, with the sum of its weights"),
        (f"{HERE}:Own,{HERE}:Another", "own is named 2 times; give each class a name of its own"),
        ("dpoo,sft", "unknown objective 'dpoo'; did you mean 'dpo'?"),
        (
            f"rmipo,{HERE}:Own",
            "needs: one run has one unconditional for all its objectives, and these differ: rmipo bos, own none",
        ),
        (f"{HERE}:Hyphen,dpo", "cannot stand side by side, each after its class's name: Field names must be valid identifiers"),
        (f"{HERE}:Twice,dpo", "cannot stand side by side, each after its class's name: Field name duplicated: 'dpo_beta'"),
        (f"epsilon_dpo,{HERE}:Own", "one perturbation for all its objectives, and these differ: epsilon_dpo 0.01, own 0.3"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        build_objective(text, {})


def test_needs_are_those_of_any_member() -> None:
    def needs(text: str) -> LogpNeeds:
        return build_objective(text, {}).needs

    assert needs("dpo,sft") == needs("sft,dpo") == LogpNeeds(reference=True)
    assert needs("rmipo,kto,beta_dpo") == LogpNeeds(unconditional="bos", reference=True, mismatched=True, batch=True)
    # The reference in memory gives what would be kept of it; a batch that is looked at beforehand has it not.
    assert needs("dpo,epsilon_dpo") == LogpNeeds(perturbation=0.01)
    assert needs("beta_dpo,epsilon_dpo") == LogpNeeds(reference=True, batch=True, perturbation=0.01)


def test_losses_and_gradients_are_the_weighted_sum() -> None:
    pairs = random_pairs(19, seed=41)
    mixed = run_with_gradients(build_objective("dpo:0.8,simpo:0.3,sft", {"dpo_beta": 0.2, "simpo_beta": 1.5}), pairs)
    alone = [
        (0.8, run_with_gradients(build_objective("dpo", {"beta": 0.2}), pairs)),
        (0.3, run_with_gradients(build_objective("simpo", {"beta": 1.5}), pairs)),
        (1.0, run_with_gradients(build_objective("sft", {}), pairs)),
    ]
    losses = sum(weight * output.losses.double() for weight, (output, _, _) in alone)
    torch.testing.assert_close(mixed[0].losses.double(), losses, rtol=1e-6, atol=1e-6)
    for number in (1, 2):
        gradient = sum(weight * one[number].double() for weight, one in alone)
        torch.testing.assert_close(mixed[number].double(), gradient, rtol=1e-6, atol=1e-8)


def test_metrics_of_the_leader_keep_their_names() -> None:
    # The same loss with one member's weight scaled: metrics are before weights.
    pairs = random_pairs(7, seed=42)
    output = build_objective("sft:0.2,dpo:0.8,simpo:0.1", {})(pairs)
    dpo, simpo, sft = (build_objective(name, {})(pairs) for name in ("dpo", "simpo", "sft"))
    rewards = {f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")}
    losses = {"dpo/loss", "simpo/loss", "sft/loss"}
    assert set(output.metrics) == rewards | losses | {f"simpo/{name}" for name in rewards}
    assert all(torch.equal(output.metrics[name], values) for name, values in dpo.metrics.items())
    assert all(torch.equal(output.metrics[f"simpo/{name}"], simpo.metrics[name]) for name in rewards)
    assert torch.equal(output.metrics["sft/loss"], sft.losses.detach())
    assert output.distributions == ("rewards/margins", "simpo/rewards/margins")


def test_state_moves_as_it_does_in_each_member_alone_and_a_batch_may_be_cut() -> None:
    torch.manual_seed(3)
    names = ("beta_dpo", "alpha_dpo", "epsilon_dpo")
    options: dict[str, dict[str, object]] = {"alpha_dpo": {"preset": "official"}}
    members = {name: build_objective(name, options.get(name, {})) for name in names}
    mixture = build_objective("beta_dpo:0.5,alpha_dpo,epsilon_dpo:2", {"preset": "official"})
    states, state = {name: member.initial_state() for name, member in members.items()}, mixture.initial_state()
    for step in range(3):
        pairs = random_pairs(9, seed=50 + step)
        # Off the reference most preferences grow, towards it they shrink.
        mixed = {f"{kind}_rejected_logps": pairs.rejected_logps.detach() for kind in ("extrapolated", "interpolated")}
        for kind, sign in (("extrapolated", 1.0), ("interpolated", -1.0)):
            mixed[f"{kind}_chosen_logps"] = pairs.chosen_logps.detach() + sign * (torch.rand(9) - 0.2)
        pairs = dataclasses.replace(pairs, **mixed)
        prepared = with_prepared(mixture, pairs, state)
        output = mixture(prepared)
        torch.testing.assert_close(torch.cat([mixture(part).losses for part in cut(prepared, 2, 5)]), output.losses)
        for name, member in members.items():
            own = with_prepared(member, pairs, states[name])
            alone = member(own)
            assert torch.equal(output.metrics[f"{name}/loss"], alone.losses.detach())
            states[name] = member.advance(states[name], own.batch, alone.metrics)
        state = mixture.advance(state, prepared.batch, output.metrics)
        assert state == {f"{name}/{key}": value for name, own_state in states.items() for key, value in own_state.items()}
    assert state["epsilon_dpo/beta"] != 0.01
    assert mixture.prepare(batch_of(pairs), state).keys() == prepared.batch.keys()


def test_a_members_losses_of_another_shape_are_told() -> None:
    with pytest.raises(ConfigError, match=re.escape("objective own: 'losses' is [] for 3 pairs")):
        build_objective(f"dpo,{HERE}:Own:0.5", {})(
            make_pairs([-1.0] * 3, [-2.0] * 3, ([1] * 3, [1] * 3), ref=([0.0] * 3, [0.0] * 3))
        )


@pytest.mark.parametrize("text", ["simpo,rmipo", "rmipo:0.5,sft"])
def test_members_remark_as_they_do_alone_weighted_or_not(text: str) -> None:
    pairs = make_pairs([-4.0, -3.0], [-10.0] * 2, ([1] * 2, [1] * 2), ([-10.0] * 2, [-10.0] * 2))
    pairs = dataclasses.replace(pairs, columns={"weight": torch.ones(2)})
    alone = build_objective("rmipo", {"preset": "paper"})
    mixture = build_objective(text, {"preset": "paper"})
    expected = alone.remark(alone(pairs).metrics)
    assert expected is not None
    for objective in (mixture, PairWeighted(mixture), PairWeighted(alone)):
        assert objective.remark(objective(pairs).metrics) == expected


def options_of(*argv: str) -> dict[str, object]:
    return parse_arguments([*BASE, *argv]).objective.options


def test_an_option_of_one_member_has_its_name_one_of_several_the_members_before_it() -> None:
    assert options_of("--objective", "dpo:0.8,sft:0.2", "--beta", "0.3")["beta"] == 0.3
    options = options_of("--objective", "dpo,simpo:0.5", "--dpo-beta", "0.3", "--gamma-beta-ratio", "0.4")
    assert (options["dpo_beta"], options["simpo_beta"], options["gamma_beta_ratio"]) == (0.3, 2.0, 0.4)
    assert "beta" not in options
    # What another option fills in is filled in here.
    assert options_of("--objective", "rmipo,sft", "--preset", "official")["margin_scale"] == "beta_gamma"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("dpo,simpo", "--beta", "1"), "--beta: --objective dpo,simpo has it more than once; say which is meant: --dpo-beta or"),
        (("dpo,simpo", "--kto-beta", "1"), "--kto-beta: unknown flag; did you mean"),
        (("dpo,sft", "--gamma-min", "1"), "--gamma-min: --objective dpo,sft has no such option"),
        (("dpo,simpo", "--simpo-beta", "-1"), "--objective dpo,simpo: simpo: beta must be a number greater than 0, not -1.0"),
        (("dpo,sft:x",), "objective 'sft:x' cannot be imported"),
        (("dpo:0.5",), "leave it out, or name another"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_arguments([*BASE, "--objective", *argv])


@pytest.mark.parametrize("text", ["dpo:0.8,sft:0.2", "simpo,rmipo:0.5,kto:2", f"{HERE}:Own:0.5,sft"])
def test_a_saved_configuration_is_read_back(text: str, tmp_path: Path) -> None:
    config = parse_arguments([*BASE, "--objective", text])
    config.save_config(tmp_path / "config.yaml")
    again = parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert [type(part) for part in objective_of(again).parts] == [type(part) for part in objective_of(config).parts]
    other = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--objective", "dpo"])
    assert other == parse_arguments([*BASE, "--objective", "dpo"])


def test_the_learning_rate_is_the_smallest_of_the_members() -> None:
    rate: Callable[[Config], float] = lambda config: config.optimizer.lr  # noqa: E731
    assert rate(parse_arguments([*BASE, "--objective", "sft:0.2,dpo"])) == 6e-7


def test_the_program_explains_a_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo:0.8,hinge:0.1,sft:0.2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("dpo:0.8,hinge:0.1,sft:0.2: L = sum over the members of weight * L_member.")
    assert "needs: reference (log-probs computed once)" in text
    assert re.search(r"^--dpo-beta +0.1 +scale of the reward \(default 0.1\)$", text, re.MULTILINE)
