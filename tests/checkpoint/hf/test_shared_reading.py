"""Weights that the replicas of a model shard read in shares and send each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.hf import weights
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights, local_tensors
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed


def load_both_ways(hf: Path) -> dict[str, Any]:
    """At EP 2 x CP 2, four replicas of all else: whether both ways give the same; bytes that were read; what a fault says."""
    groups = initialize_runtime(context_parallel_size=2, expert_model_parallel_size=2)
    arch = read_architecture(hf)
    fill_shard, read = weights.fill_shard, []

    def counted(shard: torch.Tensor, *rest: Any) -> None:
        read.append(shard.nbytes)
        fill_shard(shard, *rest)

    weights.fill_shard = counted  # type: ignore[assignment]
    loaded = []
    for way in ("each", "broadcast"):
        read.clear()
        model = build_policy(arch, transformer_config(arch, groups), groups)
        with torch.no_grad():
            for tensor in local_tensors(model, arch, groups).values():
                tensor.fill_(float("nan"))
        load_hf_weights(model, hf, arch, groups=groups, read=way)  # type: ignore[arg-type]
        loaded.append((local_tensors(model, arch, groups), sum(read)))
    if groups.rank == 3:

        def damaged(*_: Any) -> None:
            raise ConversionError("that file is damaged")

        weights.fill_shard = damaged  # type: ignore[assignment]
    with pytest.raises(ConversionError) as told:
        load_hf_weights(model, hf, arch, groups=groups, read="broadcast")
    shutdown_runtime()
    (each, own_bytes), (shared, share_bytes) = loaded
    return {
        "equal": each.keys() == shared.keys() and all(torch.equal(each[key], shared[key]) for key in each),
        "own": own_bytes,
        "share": share_bytes,
        "experts": sum(tensor.nbytes for (_, place), tensor in each.items() if place.expert is not None),
        "told": str(told.value),
    }


@pytest.mark.dist
def test_each_tensor_is_read_once_and_ends_on_every_replica(tmp_path: Path) -> None:
    found = run_distributed(load_both_ways, 4, write_hf_model(tmp_path / "hf", "mixtral", dtype=torch.bfloat16))
    assert all(one["equal"] for one in found)
    assert all("that file is damaged" in one["told"] for one in found)
    experts, others = found[0]["experts"], found[0]["own"] - found[0]["experts"]
    assert experts > 0
    # Experts have two replicas, all else has four.
    assert sum(one["share"] for one in found) == 2 * experts + others
    assert max(one["share"] for one in found) < 0.7 * found[0]["own"]
