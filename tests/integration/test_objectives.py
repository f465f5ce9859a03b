"""Every objective gives the same loss and gradients however the global batch is cut, against transformers in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.objectives.registry import OBJECTIVES
from tests.integration.problem import make_pairs, unpaired
from tests.integration.test_invariance import run_and_check
from tests.integration.worlds import Case

# Perturbations large enough that no pair's step hangs on rounding.
OPTIONS = {"epsilon_dpo": {"epsilon": 0.2}}
LAYOUTS = {
    1: [{"tokens_per_microbatch": 48}, {"tokens_per_microbatch": 200}],
    2: [{"tp": 2, "tokens_per_microbatch": 120}, {"pp": 2, "tokens_per_microbatch": 120}, {"tokens_per_microbatch": 120}],
    4: [{"tp": 2, "pp": 2, "sequence_parallel": True, "tokens_per_microbatch": 120}],
}


def cases_of(objectives: list[str], world_size: int) -> list[Case]:
    return [
        Case(f"{name} {layout}", objective=name, options=OPTIONS.get(name, {}), **layout)
        for name in objectives
        for layout in LAYOUTS[world_size]
    ]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_every_objective_is_the_same_at_every_layout(world_size: int, tmp_path: Path) -> None:
    run_and_check(cases_of(list(OBJECTIVES), world_size), world_size, make_pairs(), tmp_path)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_unpaired_rows_are_the_same_at_every_layout(world_size: int, tmp_path: Path) -> None:
    objectives = [name for name, objective in OBJECTIVES.items() if objective().needs.unpaired]
    run_and_check(cases_of(objectives, world_size), world_size, unpaired(make_pairs()), tmp_path)
