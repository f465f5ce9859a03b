"""Biases that steer routers are no parameters, and travel with the weights all the same, as precise as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint import convert
from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model

NAME = "model.layers.{}.block_sparse_moe.gate.e_score_correction_bias"


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def test_score_biases_are_read_saved_converted_and_written(
    tmp_path: Path, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = write_hf_model(tmp_path / "hf", "mixtral")
    stored = load_file(hf / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    biases = {NAME.format(layer): torch.randn(6, generator=generator) for layer in range(4)}
    save_file({**stored, **biases}, hf / "model.safetensors")
    plain = read_architecture(hf)
    assert plain.experts is not None
    experts = dataclasses.replace(plain.experts, score_function="sigmoid", score_bias=True)
    arch = dataclasses.replace(plain, experts=experts)
    policy = build_policy(arch, transformer_config(arch, groups), groups)
    load_hf_weights(policy, hf, arch, groups=groups)

    def held() -> list[torch.Tensor]:
        return [layer.mlp.router.expert_bias for layer in policy.decoder.layers]

    assert all(torch.equal(bias, biases[NAME.format(layer)]) for layer, bias in enumerate(held()))
    export_hf(policy, arch, hf, tmp_path / "out", dtype=torch.bfloat16, groups=groups)
    monkeypatch.setattr(convert, "read_architecture", lambda directory: arch)
    convert.convert_hf_to_megatron(hf, tmp_path / "checkpoints", dtype="bfloat16")
    convert.convert_megatron_to_hf(tmp_path / "checkpoints", tmp_path / "offline", dtype="bfloat16")
    for directory in ("out", "offline"):
        written = load_file(tmp_path / directory / "model.safetensors")
        assert written.keys() == stored.keys() | biases.keys()
        assert all(torch.equal(written[name], bias) for name, bias in biases.items())
        assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in stored.items())
    for bias in held():
        bias.zero_()
    load_checkpoint(
        tmp_path / "checkpoints", model=policy, optimizer=None, scheduler=None, load_rng=False, groups=groups, iteration=None
    )
    assert all(torch.equal(bias, biases[NAME.format(layer)]) for layer, bias in enumerate(held()))
