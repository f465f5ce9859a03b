"""Models as somebody else builds them, with Megatron's own specs alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.model.hybrid import HybridModel, hybrid_config, hybrid_stack
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.runtime.groups import ProcessGroups

VOCAB, PADDED, LONGEST = 41, 44, 32
# Prompt, chosen and rejected response of each pair, in tokens.
PAIRS = [(5, 4, 3), (1, 2, 6), (7, 1, 1)]
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


@dataclasses.dataclass(frozen=True)
class Built:
    """How somebody else builds a model: arguments of its class, fields of its configuration, and whether it is a HybridModel."""

    model: dict[str, Any] = dataclasses.field(default_factory=lambda: {"position_embedding_type": "rope"})
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hybrid: bool = False


KINDS = {
    "rope, tied": Built({"position_embedding_type": "rope", "share_embeddings_and_output_weights": True}),
    "part of the channels, interleaved, stretched": Built(
        {"position_embedding_type": "rope", "rotary_percent": 0.5, "seq_len_interpolation_factor": 2.0},
        {"rotary_interleaved": True, "add_qkv_bias": True, "softmax_scale": 0.3},
    ),
    "layers without rope": Built(config={"no_rope_freq": [0, 1, 0], "qk_layernorm": True}),
    "yarn": Built({"position_embedding_type": "yarn"}),
    "learned positions": Built({"position_embedding_type": "learned_absolute"}),
    "no positions": Built({"position_embedding_type": "none"}),
    # Shorter than most rows apart.
    "windows": Built(config={"window_size": (4, 0)}),
    "sinks, windows in every second layer": Built(
        config={"softmax_type": "learnable", "window_size": (2, 0), "window_attn_skip_freq": 2}
    ),
    "sinks, windows and rope in some layers": Built(
        config={"softmax_type": "learnable", "window_size": (0, 0), "window_attn_skip_freq": [0, 1, 0], "no_rope_freq": [1, 0, 0]}
    ),
}
KINDS["experts, score biases"] = Built(
    config={
        "num_moe_experts": 6,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 20,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "add_bias_linear": False,
    }
)
if HybridModel is not None:
    # Its third layer is the second with attention.
    KINDS["hybrid"] = Built(config={"softmax_type": "learnable", "window_size": (2, 0), "window_attn_skip_freq": 3}, hybrid=True)


def build(built: Built, groups: ProcessGroups, norm: Any = None) -> Any:
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": groups.tp_size,
        "sequence_parallel": groups.tp_size > 1,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "init_method_std": 0.3,
        "normalization": "LayerNorm" if norm is None else "RMSNorm",
    }
    config = TransformerConfig(**{**settings, **built.config})
    if built.model.get("position_embedding_type") == "yarn":
        for name, value in YARN.items():
            setattr(config, name, value)
    further = {"max_sequence_length": LONGEST, "parallel_output": False, "pg_collection": groups.megatron_collection()}
    spec: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if norm is not None:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        spec = TransformerBlockSubmodules(layer_specs=[spec] * 3, layer_norm=norm)
    if built.hybrid:
        stack = hybrid_stack(spec, spec, RMSNorm)
        return HybridModel(hybrid_config(config), stack, PADDED, hybrid_layer_pattern="*-*-*-", **further, **built.model)
    return GPTModel(config, spec, PADDED, **further, **built.model)


class LoRALinear(torch.nn.Module):
    """As Megatron-Bridge 0.6.2 wraps a layer (megatron/bridge/peft/lora_layers.py, adapter_wrapper.py), on one rank.

    Args:
        to_wrap: a linear layer of Megatron's.
        rank: of the adapter.
        dropout: before it.
    """

    def __init__(self, to_wrap: torch.nn.Module, rank: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        rows, columns = to_wrap.weight.shape
        self.adapter = torch.nn.Sequential(
            torch.nn.Dropout(dropout), torch.nn.Linear(columns, rank, bias=False), torch.nn.Linear(rank, rows, bias=False)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = self.to_wrap(x, *args, **kwargs)
        return output + self.adapter(x.contiguous()).reshape(output.shape), bias

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        self.to_wrap.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        self.adapter.state_dict(destination=destination, prefix=f"{prefix}adapter.", keep_vars=keep_vars)
        return destination

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        return self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)


def add_adapters(model: Any, dropout: float = 0.0) -> None:
    """LoRA on every linear layer of the decoder, all else frozen."""
    model.requires_grad_(False)
    for module in list(model.decoder.modules()):
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            if name in module._modules:
                module._modules[name] = LoRALinear(module._modules[name], dropout=dropout)
