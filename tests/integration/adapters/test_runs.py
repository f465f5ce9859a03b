"""Runs that train an adapter, by the command line: killed and gone on with, and checkpoints that do not fit refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rmipo.checkpoint.shares import adapter_state
from megatron_rmipo.command import STOPPED
from megatron_rmipo.model.lora.held import HeldFactor, held_factors
from megatron_rmipo.runtime.groups import shutdown_runtime
from megatron_rmipo.training import main as trainer
from tests.harness import run_distributed
from tests.integration.adapters.test_checkpoints import read
from tests.integration.data import write_pairs
from tests.integration.test_agreement import told
from tests.integration.test_kills import STEP, Blow, start
from tests.integration.test_reference import other_model
from tests.integration.test_training import flags, losses

SHORT: dict[str, Any] = {"lr_warmup_iters": None, "split": None}
LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 5.0}
MISSING = "decoder.layers.1.mlp.linear_fc2.adapter.linear_out.weight"
# Case -> (changed flags, what of the checkpoints is loaded, words of the refusal).
REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "rank": ({"lora_rank": 4}, "adapter", ["--lora-rank", "another than the flags say"]),
    "alpha": ({"lora_alpha": 6.0}, "adapter", ["--lora-alpha", "another than the flags say"]),
    "scale": ({"use_rslora": True}, "adapter", ["--use-rslora", "another than the flags say"]),
    "target": ({"lora_target_modules": "q_proj"}, "adapter", ["(--lora-target-modules", "another than the flags say"]),
    "lengths": ({"use_dora": True}, "adapter", ["(--use-dora)", "another than the flags say"]),
    "module": ({"lora_modules_to_save": "lm_head"}, "adapter", ["(--lora-modules-to-save)", "another than the flags say"]),
    "base": ({"load_hf": "other"}, "adapter", ["iter_0000001 holds an adapter of another model", "--load-hf"]),
    "missing factor": ({}, "incomplete", [f"{MISSING} is missing"]),
    "no flags": ({"lora_rank": None, "lora_alpha": None}, "adapter", ["hold an adapter alone (rank 3)", "--lora-rank"]),
    "whole model": ({}, "whole", ["holds a whole model", "--pretrained-checkpoint", "--lora-rank"]),
}


def _one_renamed(*args: Any) -> Iterator[HeldFactor]:
    return (held._replace(key="other") if held.key == MISSING else held for held in held_factors(*args))


def refusals(folder: str) -> dict[str, str]:
    """What each case ends with, of checkpoints that are written first."""
    where, found = Path(folder), {}
    prefix = where / "pairs"

    def of(name: str, **changes: Any) -> list[str]:
        return flags(prefix, where / name, **{**SHORT, **changes})

    once = {"train_iters": 3, "exit_interval": 1}
    assert trainer.main(of("adapter", **LORA, **once)) == STOPPED
    assert trainer.main(of("whole", **once)) == STOPPED
    with mock.patch.object(adapter_state, "held_factors", _one_renamed):
        assert trainer.main(of("incomplete", **LORA, **once)) == STOPPED
    for case, (changes, of_name, _) in REFUSED.items():
        changes = {name: where / "other" if name == "load_hf" else value for name, value in changes.items()}
        found[case] = told(of(f"refused {case}", **{**LORA, **changes, "load": where / of_name, "train_iters": 3}))
        shutdown_runtime()
    return found


@pytest.mark.dist
def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    other_model(tmp_path / "other")
    found = run_distributed(refusals, 1, str(tmp_path))[0]
    unsaid = {case: (word, found[case]) for case, (*_, words) in REFUSED.items() for word in words if word not in found[case]}
    assert unsaid == {}


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_is_killed_and_gone_on_with_is_the_run_that_was_not_to_the_bit(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    settings: dict[str, Any] = {
        **SHORT,
        **LORA,
        **{"use_dora": True, "lora_plus_ratio": 4.0, "lora_modules_to_save": "lm_head", "objective": "dpo"},
        **{"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True},
        **{"train_iters": 4, "save_interval": 1},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes, text = start(flags(prefix, whole, **settings, load=whole), tmp_path)
    assert codes == [0, 0], text
    arguments = flags(prefix, parts, **settings, load=parts)
    codes, text = start(arguments, tmp_path, Blow(1, STEP, 3))
    assert 0 not in codes, text
    codes, text = start(arguments, tmp_path)
    assert codes == [0, 0], text
    assert "from step 2" in text or "step 2 of" in text, text
    assert losses(parts) == losses(whole)
    first, second = (read(save, 4) for save in (whole, parts))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
