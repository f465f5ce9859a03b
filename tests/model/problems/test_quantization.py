"""``--quantize-base`` where it cannot work."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import Experts
from megatron_rmipo.model.problems import quantization
from megatron_rmipo.model.problems.layout import layout_problems, machine_problems
from megatron_rmipo.objectives.arguments import parse_arguments
from tests.training.test_validation import ARCH, BASE

# Twelve heads of a block each, as many blocks in the MLP, three in the hidden size.
WIDE = dataclasses.replace(ARCH, hidden_size=192, kv_channels=64, ffn_hidden_size=768)


def config_of(*argv: str) -> Config:
    return parse_arguments([*BASE, "--lora-rank", "4", "--quantize-base", "nf4", *argv])


def installed(monkeypatch: pytest.MonkeyPatch, *, bitsandbytes: bool) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return (True if bitsandbytes else None) if name == "bitsandbytes" else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, bitsandbytes=False)
    (problem,) = machine_problems(config_of())
    assert "--quantize-base nf4 needs bitsandbytes, which is not installed. pip install 'megatron_rmipo[quantize]'" in problem
    installed(monkeypatch, bitsandbytes=True)
    assert not list(machine_problems(config_of()))


def test_layers_of_transformer_engine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, bitsandbytes=True)
    monkeypatch.setattr(quantization, "transformer_engine_layers", lambda model: model.transformer_impl != "local")
    (problem,) = machine_problems(config_of())
    assert "give --transformer-impl local" in problem
    assert not list(machine_problems(config_of("--transformer-impl", "local")))


@pytest.mark.parametrize("tensor_size", [1, 2, 3, 4, 6, 12])
def test_rows_of_whole_blocks_work(tensor_size: int) -> None:
    config = config_of("--tensor-model-parallel-size", str(tensor_size))
    assert not list(layout_problems(config, dataclasses.replace(WIDE, num_query_groups=12), 12))


def test_rows_that_are_no_whole_blocks_are_named_with_sizes_that_work() -> None:
    (problem,) = layout_problems(
        config_of("--tensor-model-parallel-size", "4"), dataclasses.replace(WIDE, ffn_hidden_size=384), 4
    )
    assert "blocks of 64 numbers; at --tensor-model-parallel-size 4 those on a rank are: linear_fc2 96" in problem
    assert problem.endswith("would work: 1, 2")
    # Rows of the hidden size are cut at no layout.
    problems = list(layout_problems(config_of(), dataclasses.replace(WIDE, hidden_size=200), 1))
    assert "linear_qkv 200, linear_fc1 200; leave it out for this model" in problems[0]


def test_rows_of_experts_are_cut_by_their_own_size() -> None:
    arch = dataclasses.replace(WIDE, family="mixtral", experts=Experts(num_experts=4, per_token=2, ffn_hidden_size=192))
    both = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    (problem,) = layout_problems(config_of(*both), arch, 2)
    assert "at --expert-tensor-parallel-size 2 those on a rank are: linear_fc2 96; would work: 1" in problem
    assert not list(layout_problems(config_of(*both, "--expert-tensor-parallel-size", "1"), arch, 2))
