"""Names and options: what is known, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.config.values import field_types
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
    kinds: dict[str, set[tuple[type, bool]]] = {}
    for objective in OBJECTIVES.values():
        for name, kind in field_types(objective.Config).items():
            kinds.setdefault(name, set()).add((kind.base, kind.is_list))
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
        ("mine.Mine", {}, ["unknown objective 'mine.Mine'; did you mean 'mine:Mine', a colon before the class?"]),
        (":Mine", {}, ["':Mine' must be named package.module:Class"]),
        (".mine:Mine", {}, ["'.mine:Mine' must be named package.module:Class"]),
        ("mine:", {}, ["'mine:' must be named package.module:Class"]),
        ("simpo", {"gamma_min": 0.3}, ["'simpo' has no option gamma_min; it has beta, gamma_beta_ratio"]),
        ("sft", {"beta": 2.0}, ["'sft' has no option beta; it has none"]),
        ("no.such.module:Loss", {}, ["cannot be imported: ModuleNotFoundError: No module named 'no'", "PYTHONPATH"]),
        ("megatron_rmipo.objectives.rmipo:Nothing", {}, ["cannot be imported", "Nothing"]),
        ("megatron_rmipo.objectives.base:PairLogps", {}, ["not a subclass"]),
    ],
)
def test_refusals_name_the_remedy(name: str, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        build_objective(name, options)
    assert all(word in str(error.value) for word in words), error.value


HEADER = """
import dataclasses
from megatron_rmipo.objectives.base import LogpNeeds, Objective
@dataclasses.dataclass(frozen=True)
class Options:
    beta: float = 1.0
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Mine(Objective): name, Config = 'mine', Options", ["must define __call__"]),
        ("class Mine(Objective): Config, __call__ = Options, None", ["class attribute name"]),
        ("class Mine(Objective): name, Config, __call__ = 3, Options, None", ["class attribute name"]),
        ("class Mine(Objective): name, __call__ = 'mine', None", ["class attribute Config"]),
        ("class Mine(Objective): name, Config, __call__ = 'mine', dict, None", ["class attribute Config", "dataclass"]),
        (
            "Options.__annotations__['beta'] = dict\nclass Mine(Objective): name, Config, __call__ = 'm', Options, None",
            ["beta", "dict"],
        ),
        (
            "Options.__annotations__['beta'] = 'Real'\nclass Mine(Objective): name, Config, __call__ = 'm', Options, None",
            ["'Real'"],
        ),
        (
            "class Mine(Objective): name, Config, needs, __call__ = 'm', Options, {'batch': True}, None",
            ["needs must be a property"],
        ),
        (
            "class Mine(Objective):\n def needs(self): pass\n name, Config, __call__ = 'm', Options, None",
            ["that gives LogpNeeds(...), not <bound method"],
        ),
        (
            "class Mine(Objective): name, Config, __call__, needs = 'm', Options, None, property(lambda _: LogpNeeds('eos'))",
            ["unconditional must be one of bos, none, not 'eos'"],
        ),
        (
            "class Mine(Objective): name, Config, __call__, default_lr = 'm', Options, None, 0.0",
            ["default_lr must be a number greater than 0, not 0.0"],
        ),
        ("1 / 0", ["cannot be imported: ZeroDivisionError: division by zero", "python -c 'import {module}' tells more"]),
        ("class Mine(", ["cannot be imported: SyntaxError", "{module}.py"]),
        ("class Other(Objective): pass", ["module {module} has no Mine"]),
    ],
)
def test_a_fault_in_a_class_of_ones_own_is_told(
    text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path.name
    (tmp_path / f"{module}.py").write_text(HEADER + text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=module) as error:
        build_objective(f"{module}:Mine", {})
    assert all(word.format(module=module) in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"unconditional": "eos"}, "unconditional must be one of bos, none, not 'eos'"),
        ({"perturbation": 0.0}, "perturbation must be a number greater than 0, not 0.0"),
        ({"perturbation": float("nan")}, "perturbation must be a number greater than 0, not nan"),
    ],
)
def test_needs_that_nothing_answers_are_refused(needs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        LogpNeeds(**needs)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_option_has_a_line_of_help(name: str) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(OBJECTIVES[name].Config))


def test_needs_follow_the_options() -> None:
    assert build_objective("rmipo", {}).needs == LogpNeeds(unconditional="bos")
    assert build_objective("rmipo", {"preset": "official"}).needs == LogpNeeds(unconditional="none")
    assert build_objective("rmipo", {"margin_signal": "gap"}).needs == LogpNeeds()
    assert build_objective("simpo", {}).needs == LogpNeeds()
    assert build_objective("dpo", {}).needs == LogpNeeds(reference=True)
