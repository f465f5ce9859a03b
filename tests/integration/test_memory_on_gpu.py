"""Flags that save memory, on a GPU: a short run with them has the losses of one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.objectives.arguments import parse_arguments
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.test_training import flags, losses, run

PLAIN: dict[str, Any] = {"bf16": True, "use_distributed_optimizer": True, "train_iters": 3}
KEPT = {"use_precision_aware_optimizer": True}
SETS: dict[str, dict[str, Any]] = {
    "the optimizer in fp32 of its own": KEPT,
    "the optimizer in fewer digits": {
        **KEPT,
        "main_grads_dtype": "bf16",
        "main_params_dtype": "fp16",
        "exp_avg_dtype": "fp16",
        "exp_avg_sq_dtype": "fp16",
    },
    "half of the optimizer on the host": {**KEPT, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "modules computed anew": {"recompute_granularity": "selective", "recompute_modules": "core_attn mlp"},
    "activations on the host": {
        "fine_grained_activation_offloading": True,
        "offload_modules": "qkv_linear core_attn attn_proj",
        "min_offloaded_tensor_size": 1,
    },
}


def arguments(prefix: Path, save: Path, changes: dict[str, Any]) -> list[str]:
    """Of a run; names of modules are words of their own."""
    modules = [changes[name] for name in ("recompute_modules", "offload_modules") if name in changes]
    given = flags(prefix, save, **{**PLAIN, **changes})
    return [word for one in given for word in (one.split() if one in modules else [one])]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETS)
def test_the_losses_are_those_of_a_run_without(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    prefix = write_pairs(tmp_path / "data" / "pairs")
    for folder, changes in (("plain", {}), ("saving", SETS[name])):
        assert run_distributed(run, 1, arguments(prefix, tmp_path / folder, changes)) == [0]
    plain, saving = losses(tmp_path / "plain"), losses(tmp_path / "saving")
    # The first comes before any update; later ones feel the digits of the optimizer.
    assert saving[1] == pytest.approx(plain[1], rel=1e-3)
    assert saving == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("name", SETS)
def test_these_are_flags_that_the_trainer_reads(name: str, tmp_path: Path) -> None:
    parse_arguments(arguments(tmp_path / "pairs", tmp_path, SETS[name]))
