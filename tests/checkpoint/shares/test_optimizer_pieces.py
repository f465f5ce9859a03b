"""The distributed optimizer's state, written and read in shares: the same checkpoint as Megatron-Core's gathered form."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_rmipo.checkpoint.megatron.common_state import CONTENT
from megatron_rmipo.checkpoint.megatron.directory import checkpoint_path, latest_complete_iteration, read_metadata
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.run_state import sharded_state
from megatron_rmipo.checkpoint.megatron.store import CheckpointSaver
from megatron_rmipo.checkpoint.shares.adam_state import load_optimizer
from megatron_rmipo.checkpoint.shares.optimizer_pieces import _held, boxes
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState
from tests.checkpoint.megatron.test_store_experts import start, take_steps
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 9), (3, 1, 4), (2, 3, 5, 2)])
def test_boxes_are_the_flat_range_in_its_order(shape: tuple[int, ...]) -> None:
    whole, drawn = torch.arange(math.prod(shape)).view(shape), random.Random(5)
    for _ in range(50):
        start, stop = sorted(drawn.sample(range(whole.numel() + 1), 2))
        parts = []
        for offsets, sizes in boxes(start, stop, shape):
            box = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
            assert box.shape == sizes
            parts.append(box.flatten())
        assert torch.equal(torch.cat(parts), torch.arange(start, stop))
        assert len(parts) <= 2 * len(shape) - 1


def held(state: TrainingState) -> list[torch.Tensor]:
    """Every tensor of the optimizer that this rank holds, and the weights."""
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    found = [states[name] for part in parts for _, _, states in _held(part) for name in sorted(states)]
    return [tensor.detach().clone() for tensor in (*found, *state.model.parameters())]


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    found = dist_checkpointing.load_plain_tensors(str(path))
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def save_and_load(hf: Path, folder: Path) -> None:
    """In shares, in the background and gathered by Megatron-Core; every way back."""
    groups = initialize_runtime()
    state = start(hf, ParallelConfig(use_distributed_optimizer=True), groups)
    take_steps(state, 2)
    expected = held(state)
    stored: dict[str, Any] = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler}
    for name, in_background in (("shares", False), ("background", True)):
        with CheckpointSaver(groups, in_background=in_background) as saver:
            # The later ones know the structure from the first.
            for step in (1, 2, 3):
                saver.save(folder / name, step, **stored, train_state={"step": step}, config={}, assets_dir=hf)
                if in_background:
                    assert latest_complete_iteration(folder / name) == (step - 1 or None)
                    if step == 3:
                        # What is written is what was there when it was saved.
                        take_steps(state, 1)
            saver.wait()
            assert saver.finish_if_written()
        assert latest_complete_iteration(folder / name) == 3
        assert load_checkpoint(folder / name, **stored, load_rng=True, groups=groups) == {"step": 3}
        assert all(map(torch.equal, held(state), expected)), name
    assert not hasattr(read_metadata(checkpoint_path(folder / "shares", 1)), "all_local_plans")

    metadata = {"dp_cp_group": groups.dp, **CONTENT}
    weights = unwrapped(state.model.chunks[0]).sharded_state_dict(metadata=metadata)
    gathered = {"model": weights, "optimizer": state.optimizer.sharded_state_dict(weights, metadata=metadata)}
    (folder / "gathered").mkdir(exist_ok=True)
    dist_checkpointing.save(gathered, str(folder / "gathered"), content_metadata=dict(CONTENT))
    theirs = stored_tensors(folder / "gathered")
    assert any(key.startswith("optimizer.state.exp_avg.") and "experts.linear_fc1" in key for key in theirs)
    for name in ("shares", "background"):
        ours = stored_tensors(checkpoint_path(folder / name, 3))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())

    take_steps(state, 1)
    own = sharded_state(state.model, state.optimizer, None, groups, is_loading=True)
    loaded = dist_checkpointing.load(own, str(folder / "gathered"))
    unwrapped(state.model.chunks[0]).load_state_dict(loaded["model"], strict=False)
    load_optimizer(state.optimizer, loaded["optimizer"])
    assert all(map(torch.equal, held(state), expected))

    # What one rank cannot read, the others do not wait for.
    file = checkpoint_path(folder / "shares", 3) / "__1_0.distcp"
    if groups.rank == 0:
        file.write_bytes(bytes(file.stat().st_size))
    groups.world.barrier().wait()
    with pytest.raises(CheckpointError, match="iter_0000003 cannot be loaded: "):
        load_checkpoint(folder / "shares", **stored, load_rng=True, groups=groups, verify=False)
    shutdown_runtime()


@pytest.mark.dist
def test_shares_make_the_checkpoint_that_gathering_makes(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen2_moe")
    run_distributed(save_and_load, 2, hf, tmp_path)
    for name in ("shares", "background"):
        path = checkpoint_path(tmp_path / name, 3)
        sizes = [sum(file.stat().st_size for file in path.glob(f"__{rank}_*.distcp")) for rank in range(2)]
        assert max(sizes) < 1.2 * sum(sizes) / 2, sizes
