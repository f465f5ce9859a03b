"""A run that was saved at one layout goes on at another: what the next step finds and makes of the weights is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import export_hf
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.config.schema import Config, OptimizerConfig
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import StepOutcome, train_step
from tests.harness import run_distributed
from tests.integration.problem import NUM_PAIRS, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, build_batches, build_state, run_at_layouts

# Dense layers and sparse ones; of four ranks those that a layout leaves are data-parallel ones.
MODEL: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "layers": 8, "head_dim": 12, "mlp_only_layers": [0, 3, 4, 6]},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
}
SHARED: dict[str, Any] = {"distributed_optimizer": True, "overlap": True, "tokens_per_microbatch": 120}
LAYOUTS = [
    Case("TP 2 SP x DP 2", tp=2, sequence_parallel=True, **SHARED),
    Case("CP 2 x DP 2", cp=2, **SHARED),
    Case("PP 2 x VPP 2 x DP 2", pp=2, split={"num_layers_per_virtual_pipeline_stage": 2}, vocab_multiple=3, **SHARED),
    Case("uneven PP 2 x CP 2", pp=2, cp=2, split={"decoder_last_pipeline_num_layers": 3}, **SHARED),
    Case("EP 2 x CP 2 x DP 2", ep=2, cp=2, cp_comm_type="a2a", vocab_multiple=1, **SHARED),
]
BEFORE = 2


def config_of(case: Case) -> Config:
    # Of so large an eps Adam's steps differ as much as gradients do, and both of its moments still count.
    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-2, weight_decay=0.1, clip_grad=1.0, lr_decay_style="cosine")
    return dataclasses.replace(case.config(), optimizer=optimizer)


def take_step(case: Case, state: TrainingState, number: int, pairs: PairCollection, groups: ProcessGroups) -> StepOutcome:
    """The step of this number, over a third of the pairs."""
    size = NUM_PAIRS // 3
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(number * size, (number + 1) * size))
    return train_step(state, batch, build_objective(case.objective, case.options), groups)


def train(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    """Some steps from the model's weights, a checkpoint, the next step; what that one finds."""
    where = Path(folder)
    state = build_state(case, where / "model", groups, config=config_of(case))
    for number in range(BEFORE):
        take_step(case, state, number, pairs, groups)
    state.gather_parameters()
    stored = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "groups": groups}
    save_checkpoint(where / case.name, BEFORE, **stored, train_state={}, config={}, assets_dir=where / "model")  # type: ignore[arg-type]
    export(state, where / f"{case.name} before", groups)
    return next_step(case, state, where / f"{case.name} goes on", pairs, groups)


def go_on(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, dict[str, Any]]:
    """The next step from the checkpoint of each layout, by its name, in a model of other weights."""
    where, found = Path(folder), {}
    policy = build_model(read_architecture(where / "model"), config_of(case), groups)
    state = build_training_state(policy, config_of(case), groups, train_iters=10)
    for of in LAYOUTS:
        stored = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "groups": groups}
        # Megatron's goes on by what it loads, from where it stands.
        state.scheduler.num_steps = 0
        load_checkpoint(where / of.name, **stored, load_rng=True)  # type: ignore[arg-type]
        found[of.name] = next_step(case, state, where / f"{of.name} at {case.name}", pairs, groups)
    return found


def next_step(case: Case, state: TrainingState, export_to: Path, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    outcome = take_step(case, state, BEFORE, pairs, groups)
    assert outcome.updated
    state.gather_parameters()
    export(state, export_to, groups)
    return {"loss": outcome.metrics.values["loss"].double().mean().item(), "norm": outcome.grad_norm, "lr": outcome.learning_rate}


def export(state: TrainingState, directory: Path, groups: ProcessGroups) -> None:
    export_hf(state.policy, state.policy.architecture, directory.parent / "model", directory, dtype=None, groups=groups)


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def train_and_go_on(folder: str, pairs: PairCollection) -> tuple[list[Any], list[Any]]:
    """What the runs find that nothing interrupts, and those that go on."""
    return run_at_layouts(train, LAYOUTS, folder, pairs), run_at_layouts(go_on, LAYOUTS, folder, pairs)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_goes_on_from_each_layout_at_each_other(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "model", **MODEL)
    whole, resumed = run_distributed(train_and_go_on, 4, str(tmp_path), collection(make_pairs()))[0]
    for of, expected in zip(LAYOUTS, whole, strict=True):
        before, after = tensors(tmp_path / f"{of.name} before"), tensors(tmp_path / f"{of.name} goes on")
        changes = {name: tensor - before[name] for name, tensor in after.items()}
        largest = max(change.norm() for change in changes.values())
        for at, found in zip(LAYOUTS, resumed, strict=True):
            assert found[of.name] == pytest.approx(expected, rel=1e-5), (of.name, at.name)
            there = tensors(tmp_path / f"{of.name} at {at.name}")
            assert there.keys() == after.keys()
            for name, change in changes.items():
                error = (there[name] - after[name]).norm() / max(change.norm(), 1e-2 * largest)
                assert error < 1e-4, (of.name, at.name, name, float(error))
                assert torch.isfinite(there[name]).all()
