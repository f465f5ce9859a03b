"""Sizes of models of no family here, against those of a family's own rules."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.families.foreign import foreign_architecture
from megatron_rmipo.families.tensors import active_parameters, layer_parameters, num_parameters
from megatron_rmipo.memory.estimate import pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.model.flops import forward_cost_model

LLAMA = ModelArchitecture(
    family="llama",
    num_layers=3,
    hidden_size=40,
    ffn_hidden_size=56,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=83,
    max_position_embeddings=96,
    ropes=(Rope(1e4),),
    layernorm_epsilon=1e-5,
    dtype="bfloat16",
)


def config_of(arch: ModelArchitecture, **changes: Any) -> Any:
    """Megatron's configuration of a model, as a provider has it."""
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
    )
    settings = {name: getattr(arch, name) for name in (*names, "layernorm_epsilon")}
    return SimpleNamespace(
        **settings
        | {
            "seq_length": arch.max_position_embeddings,
            "share_embeddings_and_output_weights": arch.tied_embeddings,
            "params_dtype": getattr(torch, arch.dtype),
            "gated_linear_unit": True,
            "add_bias_linear": arch.mlp_bias,
            "add_qkv_bias": arch.qkv_bias,
        }
        | changes
    )


@pytest.mark.parametrize("traits", [(), ("tied_embeddings",), ("qkv_bias",), ("qkv_bias", "mlp_bias", "attention_output_bias")])
def test_sizes_are_those_of_a_familys_rules(traits: tuple[str, ...]) -> None:
    arch = dataclasses.replace(LLAMA, **dict.fromkeys(traits, True))
    foreign = foreign_architecture(config_of(arch), "model")
    assert num_parameters(foreign) == active_parameters(foreign) == num_parameters(arch)
    assert sum(layer_parameters(foreign, 1)) == sum(layer_parameters(arch, 1))
    assert forward_cost_model(foreign) == forward_cost_model(arch)
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True))
    # Which of the biases are cut is not told apart.
    assert standing_memory(foreign, config, 4, 0).total == pytest.approx(standing_memory(arch, config, 4, 0).total, rel=0.02)
    pack = PackSize(num_tokens=70, num_scored=23)
    assert pack_memory(foreign, config, pack, backward=True) == pack_memory(arch, config, pack, backward=True)
    same = ("longest_sequence", "query_size", "mlp_widths", "dtype", "vocab_size", "tied_embeddings")
    assert [getattr(foreign, name) for name in same] == [getattr(arch, name) for name in same]


def test_what_megatron_would_fill_in_is_filled_in() -> None:
    open_fields = {"kv_channels": None, "num_query_groups": None, "ffn_hidden_size": None, "hidden_size": 48}
    foreign = foreign_architecture(config_of(LLAMA, gated_linear_unit=False, **open_fields), "model")
    assert (foreign.kv_channels, foreign.num_query_groups, foreign.ffn_hidden_size) == (8, 6, 192)
    assert foreign.layer_matrices == 4 * 48 * 48 + 2 * 48 * 192


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConversionError, match="model: Megatron-Bridge's SimpleNamespace says vocab_size None, which is no size"):
        foreign_architecture(config_of(LLAMA, vocab_size=None), "model")
