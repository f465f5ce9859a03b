"""What a checkpoint of an adapter holds beside its factors: modules that are trained whole, of some layers or of all."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, write_model
from tests.integration.adapters.test_checkpoints import load, read, save
from tests.integration.adapters.worlds import build_adapted
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, run_at_layouts

LORA = LoraConfig(lora_rank=2, lora_target_modules=["qkv_proj"], lora_modules_to_save=["layers.1.input_layernorm"])
NORM = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
CASES = [Case("TP 1", model="phi3"), Case("PP 2", model="phi3", pp=2)]


def save_or_load(case: Case, folder: str, _pairs: PairCollection, groups: ProcessGroups) -> Any:
    """The one norm that is trained, on the ranks that hold it; the first layout trains it, the other has it from there."""
    config = dataclasses.replace(case.config(), lora=LORA)
    state = build_adapted(case, Path(folder), groups, config)
    trained = [one for one in state.policy.parameters() if one.requires_grad and one.dim() == 1]
    if case.pp == 1:
        trained[0].main_grad.copy_(torch.arange(trained[0].numel()))  # type: ignore[attr-defined]
        state.optimizer.step()
        save(state, Path(folder) / "saved", groups)
    else:
        load(state, Path(folder) / "saved", groups)
        moments = state.optimizer.optimizer.state
        assert all(float(moments[one]["exp_avg"].norm()) > 0 for one in trained)
    return [one.detach().clone() for one in trained]


@pytest.mark.dist
def test_a_module_that_is_trained_whole_in_one_layer_is_kept_by_its_layer(tmp_path: Path) -> None:
    write_model(tmp_path / "phi3" / "model", FORMS["phi3"])
    first, second = run_distributed(
        functools.partial(run_at_layouts, save_or_load), 2, CASES, str(tmp_path), collection(make_pairs(2))
    )
    stored = read(tmp_path / "saved")[NORM]
    assert f"optimizer.state.exp_avg.{NORM}" in read(tmp_path / "saved")
    assert [len(results) for results in (*first, *second)] == [1, 0, 1, 1]
    for found in (*first[0], *second[0], *second[1]):
        assert torch.equal(found, stored)
