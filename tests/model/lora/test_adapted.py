"""What adapted layers keep for the backward pass: frozen weights have no gradient to compute."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.inputs import random_pairs
from benchmarks.measure import counted_flops
from benchmarks.sides import batch_builder, build_state
from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.step_passes import gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime

ARCH = ModelArchitecture("llama", 2, 64, 112, 4, 2, 16, 128, 512, (Rope(1e4),), 1e-5)
RANK = 2


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


class Kept:
    """Bytes of tensors that autograd keeps, those of parameters left out; each once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self._tensors: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._tensors[storage.data_ptr()] = tensor
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(one.untyped_storage().nbytes() for one in self._tensors.values())


def gradient(groups: ProcessGroups, rank: int | None) -> tuple[int, float, RankBatch]:
    """Bytes kept by, and FLOPs of, a gradient pass of SimPO; and its batch."""
    torch.manual_seed(3)
    state, objective = build_state(ARCH, groups, bf16=False, lora_rank=rank), build_objective("simpo", {})
    pairs = random_pairs(np.array([[31, 17, 23], [9, 40, 11]]), ARCH.vocab_size, np.random.default_rng(4))
    batch = batch_builder(pairs, ARCH, objective, 256).build(np.arange(2))
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups, None)
    state.model.train()
    kept = Kept(state.model)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        flops = counted_flops(lambda: gradient_pass(state.model, batch, objective, prepared, groups))
    trained = [one for one in state.model.parameters() if one.requires_grad]
    assert all(vars(one)["main_grad"].abs().sum() > 0 for one in trained if rank is None or vars(one)["is_adapter_output"])
    return kept.num_bytes, flops, batch


def test_an_adapter_keeps_narrow_tensors_beside_what_the_model_keeps(groups: ProcessGroups) -> None:
    full, _, batch = gradient(groups, None)
    adapted, _, _ = gradient(groups, RANK)
    (row,) = batch.conditional
    # A x of the seven projections; and, as the products have them, A and B of all layers.
    num_rows, num_columns = 64 + 2 * 32 + 64 + 2 * 112 + 64, 4 * 64 + 2 * 64 + 112
    blocks = 3 * (64 + 2 * 32) + 64 + 2 * 2 * 112 + 64
    most = 4 * RANK * ARCH.num_layers * (7 * row.num_tokens + num_columns + num_rows + blocks)
    assert adapted <= full + most


def test_frozen_weights_cost_no_products_for_gradients(groups: ProcessGroups) -> None:
    _, full, batch = gradient(groups, None)
    _, adapted, _ = gradient(groups, RANK)
    (row,) = batch.conditional
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 112
    spared = 2 * (ARCH.num_layers * layer * row.num_tokens + 64 * ARCH.vocab_size * row.num_scored)
    # Of each linear layer columns and rows, and how many projections it is; forward, and two gradients.
    linears = [(64, 64 + 2 * 32, 3), (64, 64, 1), (64, 2 * 112, 2), (112, 64, 1)]
    beside = 3 * 2 * ARCH.num_layers * row.num_tokens * RANK * sum((columns + rows) * parts for columns, rows, parts in linears)
    assert full - adapted == spared - beside
