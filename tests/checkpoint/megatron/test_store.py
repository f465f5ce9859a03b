"""Checkpoints across tensor, pipeline and expert parallel sizes, in several processes over gloo."""

from __future__ import annotations

import math
import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf import assets
from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.megatron import common_state, store
from megatron_rmipo.checkpoint.megatron.common_state import is_written_as_object, read_common
from megatron_rmipo.checkpoint.megatron.directory import latest_complete_iteration
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, read_record, write_record
from megatron_rmipo.checkpoint.megatron.store import CheckpointSaver, save_checkpoint
from megatron_rmipo.checkpoint.raw_files import file_digest
from megatron_rmipo.checkpoint.shares import hashed_writes
from megatron_rmipo.checkpoint.verify import Agreement, compare_with_transformers
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed

pytestmark = pytest.mark.dist

# Kinds that differ in how embeddings, heads and experts are cut; every kind, without checkpoints, is in tests/families.
LAYOUTS = [
    *(("llama31", (2, 1, 1)), ("mistral", (1, 2, 1)), ("llama31", (2, 2, 1)), ("llama32_tied", (2, 2, 1)), ("qwen3", (2, 2, 1))),
    *(("mixtral", (2, 1, 2)), ("qwen2_moe", (1, 1, 2)), ("qwen3_moe", (1, 2, 2)), ("gpt_oss", (2, 1, 2))),
]
Sizes = tuple[int, int, int]


def start(hf: Path, sizes: Sizes) -> tuple[PolicyModel, ProcessGroups]:
    tp, pp, ep = sizes
    groups = initialize_runtime(tp, pp, expert_model_parallel_size=ep)
    arch = read_architecture(hf)
    return build_policy(arch, transformer_config(arch, groups), groups), groups


def read_and_save(hf: Path, out: Path, checkpoints: Path, sizes: Sizes) -> Agreement:
    """From HF: logits, export, and a checkpoint."""
    model, groups = start(hf, sizes)
    arch = model.architecture
    load_hf_weights(model, hf, arch, groups=groups)
    export_hf(model, arch, hf, out, dtype=None, groups=groups, max_shard_bytes=60000)
    with pytest.raises(ConversionError, match="exists and holds"):
        export_hf(model, arch, hf, out, dtype=None, groups=groups)
    state = {"step": 3, "consumed_pairs": 77}
    save_checkpoint(
        checkpoints, 3, model=model, optimizer=None, scheduler=None, train_state=state, config={}, assets_dir=hf, groups=groups
    )
    return compare(model, hf, groups)


def load(hf: Path, checkpoints: Path, sizes: Sizes) -> tuple[dict[str, int], Agreement]:
    model, groups = start(hf, sizes)
    state = load_checkpoint(checkpoints, model=model, optimizer=None, scheduler=None, load_rng=True, groups=groups)
    return state, compare(model, hf, groups)


def compare(model: PolicyModel, hf: Path, groups: ProcessGroups) -> Agreement:
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(model.architecture.vocab_size, (length,), generator=generator) for length in (1, 23, 50)]
    agreement = compare_with_transformers(model, hf, texts, groups, torch.float32)
    shutdown_runtime()
    return agreement


def assert_agrees(agreement: Agreement) -> None:
    assert agreement.num_tokens == 74
    assert agreement.max_difference < 1e-4
    assert agreement.mean_kl < 1e-8
    assert agreement.top1 == 1.0


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), LAYOUTS)
def test_every_layout_reads_computes_and_writes_the_same(tmp_path: Path, kind: str, sizes: Sizes) -> None:
    hf = write_hf_model(tmp_path / "hf", kind)
    num_ranks = math.prod(sizes)
    for agreement in run_distributed(read_and_save, num_ranks, hf, tmp_path / "out", tmp_path / "checkpoints", sizes):
        assert_agrees(agreement)
    expected = tensors(hf)
    # What training wrote, exported there and offline, is what came in: no padding, nothing lost.
    convert_megatron_to_hf(tmp_path / "checkpoints", tmp_path / "offline")
    for written in (tensors(tmp_path / "out"), tensors(tmp_path / "offline")):
        assert written.keys() == expected.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    # What was written at this layout, and what was converted offline, loads at others.
    convert_hf_to_megatron(hf, tmp_path / "converted")
    args = read_common(tmp_path / "checkpoints" / "iter_0000003")["args"]
    told = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size)
    assert (told, args.consumed_train_samples, args.no_save_optim) == (sizes, 77, True)
    state, agreement = run_distributed(load, 1, hf, tmp_path / "checkpoints", (1, 1, 1))[0]
    assert state == {"step": 3, "consumed_pairs": 77}
    assert_agrees(agreement)
    state, agreement = run_distributed(load, num_ranks, hf, tmp_path / "converted", sizes)[0]
    assert state == {}
    assert_agrees(agreement)


def save_without_space(hf: Path, checkpoints: Path) -> list[str]:
    """What is said where the disk is too small from the start, and where it fills up under rank 1's writers, beside it, too."""
    model, groups = start(hf, (2, 1, 1))
    load_hf_weights(model, hf, model.architecture, groups=groups)

    def save(iteration: int, *, in_background: bool = False) -> None:
        with CheckpointSaver(groups, in_background=in_background) as saver:
            saver.save(
                checkpoints,
                iteration,
                model=model,
                optimizer=None,
                scheduler=None,
                train_state={},
                config={},
                assets_dir=hf,
            )
            saver.wait()

    def refusal(iteration: int, *, in_background: bool = False) -> str:
        with pytest.raises(CheckpointError) as failure:
            save(iteration, in_background=in_background)
        return str(failure.value)

    save(1)
    usage = assets.shutil.disk_usage
    assets.shutil.disk_usage = lambda path: SimpleNamespace(free=1000)  # type: ignore[assignment]
    refused = [refusal(2)]
    assets.shutil.disk_usage = usage
    # The kernel's own device that is always full.
    original = hashed_writes._HashingFile.__init__
    to_full_disk = lambda self, path, send: original(self, "/dev/full", send)  # noqa: E731
    hashed_writes._HashingFile.__init__ = to_full_disk if groups.rank == 1 else original  # type: ignore[method-assign]
    return [*refused, refusal(3), refusal(4, in_background=True)]


def test_full_disk_is_told_and_spares_earlier_checkpoints(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama32_tied")
    results = run_distributed(save_without_space, 2, hf, tmp_path / "checkpoints")
    for early, late, beside in results:
        assert "step 2 was not written: no space left: " in early
        assert "MiB are needed" in early
        assert "step 3 was not written" in late
        assert "step 4 was not written" in beside
    # Newer ones hand on the type of a writer's error alone; its text is on the screen.
    if metadata.version("megatron-core").startswith("0.16."):
        for told in results[0][1:]:
            assert "the disk is full" in told
            assert "No space left on device" in told
    assert latest_complete_iteration(tmp_path / "checkpoints") == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def load_what_is_wrong(hf: Path, folder: Path) -> dict[str, str]:
    """What loading says of checkpoints that would run code, and of damage that no digest was there to find."""
    model, groups = start(hf, (2, 1, 1))
    load_hf_weights(model, hf, model.architecture, groups=groups)

    def save(name: str, **changes: Any) -> Path:
        arguments: dict[str, Any] = {"model": model, "optimizer": None, "scheduler": None, "train_state": {}, "config": {}}
        return save_checkpoint(folder / name, 1, **{**arguments, **changes}, assets_dir=hf, groups=groups)

    def refusal(name: str, *, verify: bool = False) -> str:
        with pytest.raises(CheckpointError) as failure:
            load_checkpoint(
                folder / name, model=model, optimizer=None, scheduler=None, load_rng=True, groups=groups, verify=verify
            )
        return str(failure.value)

    honest, store.random_state = store.random_state, lambda: {"python": Evil(folder / "ran")}  # type: ignore[assignment]
    save("object")
    store.random_state = honest
    common = save("common")
    damaged = save("damaged")
    record = read_record(damaged)
    assert record is not None
    if groups.rank == 0:
        torch.save({"iteration": Evil(folder / "ran")}, common / "common.pt")
        write_record(common, CheckpointRecord(1, layout=record.layout), {})
        data = bytearray((damaged / "__1_0.distcp").read_bytes())
        data[: len(data) // 2] = bytes(len(data) // 2)
        (damaged / "__1_0.distcp").write_bytes(data)
    groups.world.barrier().wait()
    outcomes = {name: refusal(name) for name in ("object", "common", "damaged")}
    outcomes["verified"] = refusal("damaged", verify=True)
    written = {name: file_digest(damaged / name) for name in record.digests if name != "__1_0.distcp"}
    assert written.items() <= record.digests.items(), "the digests of writers are those of the files"
    shutdown_runtime()
    return outcomes


def test_code_in_a_checkpoint_and_damage_met_while_reading_are_refused_on_every_rank(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama32_tied")
    for outcomes in run_distributed(load_what_is_wrong, 2, hf, tmp_path):
        for name in ("object", "common"):
            assert "mkdir" in outcomes[name], outcomes[name]
        assert "iter_0000001 cannot be loaded: " in outcomes["damaged"]
        assert "__1_0.distcp does not hold what was written" in outcomes["verified"]
    assert not (tmp_path / "ran").exists()


def test_what_another_version_of_megatron_wrote_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, is_object = write_hf_model(tmp_path / "hf", "llama32_tied"), is_written_as_object()
    monkeypatch.setattr(common_state, "is_written_as_object", lambda: not is_object)
    assert (convert_hf_to_megatron(hf, tmp_path / "converted") / "common.pt").exists() == is_object
    state, agreement = run_distributed(load, 1, hf, tmp_path / "converted", (1, 1, 1))[0]
    assert state == {}
    assert_agrees(agreement)


def load_into_another(hf: Path, checkpoints: Path) -> str:
    model, groups = start(hf, (1, 2, 1))
    try:
        load_checkpoint(checkpoints, model=model, optimizer=None, scheduler=None, load_rng=False, groups=groups)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    convert_hf_to_megatron(write_hf_model(tmp_path / "hf", "llama2"), tmp_path / "checkpoints")
    other = write_hf_model(tmp_path / "other", "llama32_tied", intermediate_size=96)
    for message in run_distributed(load_into_another, 2, other, tmp_path / "checkpoints"):
        assert "checkpoint of another model" in message
        assert "mlp.linear_fc2.weight is [4, 48, 88] there and [4, 48, 96] in the model" in message
        assert "output_layer.weight is not a tensor of the model" in message
