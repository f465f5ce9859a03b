"""Flags that save memory change neither loss nor gradients: 24 pairs against transformers in float64, as with the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.problem import make_pairs
from tests.integration.test_invariance import SPARSE, run_and_check
from tests.integration.worlds import Case

SELECTIVE: dict[str, Any] = {"recompute": "selective", "tokens_per_microbatch": 200}
WORLDS = {
    1: [
        Case("norms and MLP recomputed", memory={"recompute_modules": ["layernorm", "mlp"]}, **SELECTIVE),
        Case("experts recomputed", model="mixtral", memory={"recompute_modules": ["core_attn", "moe", "layernorm"]}, **SELECTIVE),
    ],
    2: [
        Case(
            "TP 2, sequence parallel, all recomputed",
            tp=2,
            sequence_parallel=True,
            memory={"recompute_modules": ["core_attn", "layernorm", "mlp"]},
            **SELECTIVE,
        ),
        Case(
            "EP 2, experts recomputed",
            **SPARSE,
            objective="rmipo:0.7,kto:2",
            memory={"recompute_modules": ["layernorm", "moe"]},
            **SELECTIVE,
        ),
    ],
}
TWICE: dict[str, Any] = {"distributed_optimizer": True, "instances": 2, "tokens_per_microbatch": 120}
INSTANCES = [
    Case("DP 4, two instances", **TWICE),
    Case("DP 4, two instances, overlapped", overlap=True, **TWICE),
    Case("EP 2 x DP 2, two instances", **SPARSE, **TWICE),
]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_same_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    run_and_check(WORLDS[world_size], world_size, make_pairs(), tmp_path)


@pytest.mark.dist
def test_instances_of_the_distributed_optimizer_share_gradients(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    run_and_check(INSTANCES, 4, make_pairs(), tmp_path)
