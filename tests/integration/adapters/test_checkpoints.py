"""Checkpoints of adapters: whole factors by name, the same bits at every layout; a shard that is not as it should be shows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.checkpoint.shares import adapter_state
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.model.lora.held import HeldFactor, held_factors
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime
from megatron_rmipo.training.setup import TrainingState
from megatron_rmipo.training.step import train_step
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, FactorName, Factors, PeftModel, write_changed, write_model
from tests.integration.adapters.worlds import build_adapted, fill, losses_of, name_of, stretches
from tests.integration.problem import VOCAB, collection, make_pairs
from tests.integration.worlds import Case, build_batches, end_case

NUM_PAIRS = 8
SHARDED: dict[str, Any] = {"distributed_optimizer": True, "tokens_per_microbatch": 120}
SP_2: dict[str, Any] = {"tp": 2, "sequence_parallel": True, **SHARDED}
VPP: dict[str, Any] = {"pp": 2, "split": {"num_layers_per_virtual_pipeline_stage": 1}, **SHARDED}
# What one layout saved the next one loads and saves again; the first of a form trains it. Of four ranks those that a layout
# leaves are data-parallel ones.
CHAINS = {
    "llama": [
        Case("TP 2 SP x PP 2", pp=2, **SP_2),
        Case("TP 1", **SHARDED),
        Case("TP 4 of 2 groups", tp=4, **SHARDED),
        Case("PP 2 x VPP 2", **VPP),
        Case("TP 2 SP", **SP_2),
        Case("CP 2", cp=2, **SHARDED),
    ],
    "dora": [Case("TP 4 of 2 groups", tp=4, **SHARDED), Case("PP 2", pp=2, **SHARDED), Case("TP 2 SP", **SP_2)],
    "whole modules": [Case("TP 2 SP", **SP_2), Case("PP 2", pp=2, **SHARDED)],
    "experts": [Case("EP 2 x TP 2", ep=2, etp=2, **SP_2), Case("EP 1", **SHARDED), Case("EP 2", ep=2, pp=2, **SHARDED)],
    "shared": [Case("EP 2", ep=2, **SHARDED), Case("TP 2", etp=2, **SP_2)],
}
CASES = [
    dataclasses.replace(case, name=f"{form}, {number}: {case.name}", model=form)
    for form, cases in CHAINS.items()
    for number, case in enumerate(cases)
]


def save(state: TrainingState, directory: Path, groups: ProcessGroups, *, weights_alone: bool = False) -> None:
    parts: Any = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "groups": groups}
    parts |= {"optimizer": None, "scheduler": None} if weights_alone else {}
    save_checkpoint(directory, 1, **parts, train_state={}, config={}, assets_dir=None)


def load(state: TrainingState, directory: Path, groups: ProcessGroups, *, weights_alone: bool = False) -> None:
    parts: Any = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "groups": groups}
    parts |= {"optimizer": None, "scheduler": None} if weights_alone else {}
    load_checkpoint(directory, **parts, load_rng=False)


def pass_on(case: Case, folder: Path, pairs: PairCollection, groups: ProcessGroups, before: Case | None) -> dict[str, Any]:
    """Load what the layout before saved, or train; save. The loss of all pairs, and by which key what this rank holds is kept."""
    state = build_adapted(case, folder, groups, seed=1 if before is None else 2)
    if before is None:
        fill(state, case, folder, torch.load(folder / case.model / "factors.pt", weights_only=False), groups)
        save(state, folder / f"{case.name} filled", groups)
        batch = build_batches(case, pairs, state.policy, groups).build(np.arange(NUM_PAIRS))
        for _ in range(2):
            assert train_step(state, batch, build_objective("rmipo", {}), groups).updated
        state.gather_parameters()
    else:
        load(state, folder / before.name, groups)
    save(state, folder / case.name, groups)
    keys = {held.key: name_of(held) for held in held_factors(state.policy)}
    return {"loss": float(losses_of(case, state, pairs, groups, "rmipo", None).double().mean()), "keys": keys}


def pass_on_all(folder: str, pairs: PairCollection) -> list[dict[str, Any]]:
    found = []
    for number, case in enumerate(CASES):
        before = CASES[number - 1] if number and CASES[number - 1].model == case.model else None
        groups = initialize_runtime(**case.layout())
        found.append(pass_on(case, Path(folder), pairs, groups, before))
        end_case()
    return found


def read(directory: Path, iteration: int = 1) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whole."""
    reader = dcp.FileSystemReader(directory / f"iter_{iteration:07d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(tuple(one.size), torch.nan, dtype=one.properties.dtype)
        for key, one in stored.items()
        if isinstance(one, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    # Without the rows that a layout fills a vocabulary up with.
    return {key: one[:VOCAB] if "word_embeddings" in key or "output_layer" in key else one for key, one in tensors.items()}


def prepare(folder: Path, form: str) -> Factors:
    hf = write_model(folder / form / "model", FORMS[form])
    dense = PeftModel(hf, FORMS[form])
    dense.draw()
    if changed := dense.modules():
        write_changed(hf, folder / form / "changed", changed)
    factors = dense.factors()
    torch.save(factors, folder / form / "factors.pt")
    return factors


def differing(stored: dict[str, Tensor], keys: dict[str, FactorName], factors: Factors) -> list[str]:
    """Keys whose tensor is not, bit for bit, the whole factor, or those of all experts."""
    wrong = []
    for key, name in keys.items():
        same = [name] if name.expert is None else [one for one in factors if one[::2] == name[::2]]
        expected = torch.stack([factors[one] for one in same]) if name.expert is not None else factors[name]
        if not torch.equal(stored[key].double(), expected):
            wrong.append(key)
    return wrong


@pytest.mark.dist
@pytest.mark.slow
def test_what_one_layout_saves_the_next_loads_to_the_bit(tmp_path: Path) -> None:
    factors = {form: prepare(tmp_path, form) for form in CHAINS}
    ranks = run_distributed(pass_on_all, 4, str(tmp_path), collection(make_pairs(NUM_PAIRS)))
    first: dict[str, Tensor] = {}
    loss = 0.0
    for number, case in enumerate(CASES):
        stored = read(tmp_path / case.name)
        keys = {key: name for results in ranks for key, name in results[number]["keys"].items()}
        if not number or CASES[number - 1].model != case.model:
            filled = read(tmp_path / f"{case.name} filled")
            assert differing(filled, keys, factors[case.model]) == [], case.name
            assert not any(".weight" in key and "adapter" not in key for key in filled) or case.model == "whole modules"
            changed = [key for key in keys if not torch.equal(stored[key], filled[key])]
            assert len(changed) == len(keys), "training changed all factors"
            first, loss = stored, ranks[0][number]["loss"]
            assert {key.split(".")[2] for key in stored if key.startswith("optimizer.state")} >= {"exp_avg", "exp_avg_sq"}
        assert stored.keys() == first.keys(), case.name
        assert [key for key in stored if not torch.equal(stored[key], first[key])] == [], case.name
        assert all(results[number]["loss"] == pytest.approx(loss, rel=1e-5) for results in ranks), case.name


Sharded = Callable[..., Any]


def _dropped(sharded: Sharded, held: HeldFactor, key: str, *rest: Any) -> Any:
    """The second rank's part is taken for a copy of the first's, and never written."""
    found = sharded(held, key, *rest)
    found.replica_id = (0, dist.get_rank(), 0)
    return found


def _swapped(sharded: Sharded, held: HeldFactor, key: str, *rest: Any) -> Any:
    """Each rank's part stands where its neighbour's belongs."""
    if held.is_cut and len(held.boxes) == 1:
        (offset, sizes), dim = held.boxes[0], 1 if held.kind == "A" else 0
        other = (*offset[:dim], held.shape[dim] - sizes[dim] - offset[dim], *offset[dim + 1 :])
        held = held._replace(boxes=((other, sizes),))
    return sharded(held, key, *rest)


def _by_rank(sharded: Sharded, held: HeldFactor, key: str, *rest: Any) -> Any:
    """Parts go by the number of the rank that holds them."""
    return sharded(held, f"{key}.{dist.get_rank()}" if held.is_cut else key, *rest)


FAULTS = {"": None, "swapped": _swapped, "left fresh": None}
INCOMPLETE = {"dropped": _dropped, "keyed by rank": _by_rank}


def save_and_load_with_faults(folder: str) -> dict[str, Any]:
    """With each fault: what the second layout holds of what the first one had, or what is said."""
    where, found = Path(folder), {}
    for fault, change in FAULTS.items():
        groups = initialize_runtime(tensor_model_parallel_size=2)
        case = Case("TP 2", model="llama", tp=2)
        state = build_adapted(case, where, groups)
        fill(state, case, where, torch.load(where / "llama" / "factors.pt", weights_only=False), groups)
        sharded = functools.partial(change, adapter_state.sharded_factor) if change is not None else adapter_state.sharded_factor
        try:
            with mock.patch.object(adapter_state, "sharded_factor", sharded):
                save(state, where / f"with {fault}", groups, weights_alone=True)
            end_case()
            groups = initialize_runtime()
            state = build_adapted(Case("DP 2", model="llama"), where, groups, seed=2)
            fresh = {held.full_name: held.parameter.detach().clone() for held in held_factors(state.policy)}
            load(state, where / f"with {fault}", groups, weights_alone=True)
        except CheckpointError as error:
            found[fault] = str(error)
        else:
            for held in held_factors(state.policy):
                if fault == "left fresh" and groups.rank == 1:
                    held.parameter.data.copy_(fresh[held.full_name])
            found[fault] = stretches(state.policy)
        end_case()
    return found


@pytest.mark.dist
def test_a_shard_that_is_swapped_or_left_fresh_shows(tmp_path: Path) -> None:
    factors = prepare(tmp_path, "llama")
    ranks = run_distributed(save_and_load_with_faults, 2, str(tmp_path))

    def wrong(fault: str) -> list[Any]:
        held = [one for rank in ranks for one in rank[fault]]
        return [name for name, box, own in held if not torch.equal(own.double(), factors[name][box])]

    assert wrong("") == []
    assert len(wrong("left fresh")) == len(ranks[1]["left fresh"])
    assert {name.kind for name in wrong("swapped")} == {"A", "B"}


def save_incomplete(folder: str, fault: str) -> None:
    groups = initialize_runtime(tensor_model_parallel_size=2)
    state = build_adapted(Case("TP 2", model="llama", tp=2), Path(folder), groups)
    with mock.patch.object(adapter_state, "sharded_factor", functools.partial(INCOMPLETE[fault], adapter_state.sharded_factor)):
        save(state, Path(folder) / "saved", groups)


@pytest.mark.dist
@pytest.mark.parametrize("fault", INCOMPLETE)
def test_a_shard_that_is_dropped_or_keyed_by_rank_is_not_saved(tmp_path: Path, fault: str) -> None:
    prepare(tmp_path, "llama")
    with pytest.raises(AssertionError, match=r"linear_proj.adapter.linear_in.weight(\.\d)? invalid fill tensor-volume"):
        run_distributed(save_incomplete, 2, str(tmp_path), fault)
