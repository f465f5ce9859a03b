"""What other programs read of a checkpoint beside its tensors: the ``args`` that Megatron-LM keeps in the common state.

Read in Megatron-LM (``load_args_from_checkpoint``, ``load_checkpoint`` and ``core_transformer_config_from_args`` of megatron-core
0.19.2), Megatron-Bridge 0.6.2 (``mlm_compat``, where a checkpoint has no ``run_config.yaml``) and Megatron-SWIFT 4.6. Names and
values are those of Megatron-LM's parser; only what ``torch.load(weights_only=True)`` builds may stand here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rmipo.families.architecture import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelArchitecture,
    Rope,
    YarnScaling,
    padded_vocab_size,
)
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.megatron_fields import expert_fields, latent_fields, megatron_fields

# Under which the common state lists what the arguments cannot say of the model.
BEYOND_KEY = "rmipo_beyond_args"
# What Megatron-LM's flag for Llama 3's scaling computes; other factors its 0.19.2 takes, and does not use.
_MEGATRON_LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# What a model here never has; Megatron-Bridge asks for each of these without a default.
_NOT_HAD: Mapping[str, Any] = {
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "fp16_lm_cross_entropy": False,
    "fp8_param_gather": False,
    "heterogeneous_layers_config_path": None,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "is_hybrid_model": False,
    "mtp_num_layers": None,
    "no_persist_layer_norm": False,
    "overlap_p2p_comm": False,
    "qk_l2_norm": False,
    "spec": None,
    "squared_relu": False,
}
# How Megatron-LM computes by default, and how is a matter of the one who loads; Megatron-Bridge asks for these, too.
_LEFT_TO_THE_READER: Mapping[str, Any] = {
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": True,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "transformer_impl": "transformer_engine",
}


def common_of_model(
    arch: ModelArchitecture, iteration: int, *, dtype: torch.dtype, tokenizer: Path | None, run: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of the common state that tells other programs what the model is and how far its training.

    Args:
        arch: the model.
        iteration: optimizer steps taken.
        dtype: of its weights.
        tokenizer: directory of its tokenizer, or None where none lies in the checkpoint.
        run: further arguments: parallel sizes, progress, flags, by Megatron-LM's names.
    """
    common: dict[str, Any] = {
        "args": argparse.Namespace(**_arguments(arch, dtype, tokenizer, run)),
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }
    if beyond := list(beyond_megatron_lm(arch)):
        common[BEYOND_KEY] = beyond
    return common


def _arguments(arch: ModelArchitecture, dtype: torch.dtype, tokenizer: Path | None, run: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "make_vocab_size_divisible_by": 128,
        "consumed_train_samples": 0,
        # Ours lie under another key, and in another form.
        "no_save_rng": True,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        **run,
    }
    found["vocab_size"] = arch.vocab_size
    multiple, tp_size = found["make_vocab_size_divisible_by"], found["tensor_model_parallel_size"]
    found["padded_vocab_size"] = padded_vocab_size(arch.vocab_size, multiple, tp_size)
    if tokenizer is not None:
        found |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    return found | (_sizes(arch) if isinstance(arch, ForeignArchitecture) else _model(arch))


def _sizes(arch: ForeignArchitecture) -> dict[str, Any]:
    """All that is known of a model that another package builds."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    sizes = {name: getattr(arch, name) for name in (*names, "max_position_embeddings", "layernorm_epsilon")}
    return {**sizes, "untie_embeddings_and_output_weights": not arch.tied_embeddings}


def _model(arch: ModelArchitecture) -> dict[str, Any]:
    fields = megatron_fields(arch)
    if arch.experts is not None:
        fields |= expert_fields(arch, arch.experts)
    if arch.latent is not None:
        # Here of the latents.
        fields |= {**latent_fields(arch.latent), "qk_layernorm": True}
    return {
        **_NOT_HAD,
        **_LEFT_TO_THE_READER,
        **fields,
        **_positions(arch),
        **_windows(arch),
        "num_experts": fields.get("num_moe_experts"),
        "multi_latent_attention": arch.latent is not None,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
        # The name in versions before 0.17, and that of the flag to this day.
        "norm_epsilon": arch.layernorm_epsilon,
        "apply_layernorm_1p": arch.zero_centered_norm,
        "add_bias_linear": True in _linear_biases(arch),
        "swiglu": arch.activation == "silu",
        "quick_geglu": arch.activation == "clamped_swiglu",
        "softmax_type": "learnable" if arch.attention_sinks else "vanilla",
        "apply_query_key_layer_scaling": False,
        "max_position_embeddings": arch.max_position_embeddings,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
    }


def _positions(arch: ModelArchitecture) -> dict[str, Any]:
    rope, turned = arch.ropes[0], 1.0 if arch.latent else arch.turned_channels / arch.kv_channels
    found: dict[str, Any] = {
        "position_embedding_type": "rope",
        # Megatron-LM compares it with that of the run, where True stands for any kind.
        "add_position_embedding": True,
        "rotary_base": _whole(rope.base),
        "rotary_percent": turned,
        "use_rope_scaling": isinstance(rope.scaling, Llama3Scaling),
        "rotary_seq_len_interpolation_factor": None,
    }
    match rope.scaling:
        case LinearScaling(factor):
            found["rotary_seq_len_interpolation_factor"] = _whole(factor)
        case Llama3Scaling(factor=factor):
            found["rope_scaling_factor"] = factor
        case YarnScaling():
            found |= {
                "position_embedding_type": "yarn",
                "rotary_scaling_factor": rope.scaling.factor,
                "yarn_original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
                "yarn_beta_fast": rope.scaling.beta_fast,
                "yarn_beta_slow": rope.scaling.beta_slow,
                "yarn_correction_range_round_to_int": rope.scaling.truncate,
                "mscale": 1.0,
                "mscale_all_dim": 0.0,
            }
    without = [int(arch.kind_of(layer).rope is None) for layer in range(arch.num_layers)]
    return {**found, "no_rope_freq": without if any(without) else None}


def _windows(arch: ModelArchitecture) -> dict[str, Any]:
    windows = [arch.kind_of(layer).window for layer in range(arch.num_layers)]
    widest = max((window for window in windows if window is not None), default=None)
    return {
        # Megatron counts the tokens before a token, and those behind it.
        "window_size": None if widest is None else (widest - 1, 0),
        "window_attn_skip_freq": [int(window is not None) for window in windows] if None in windows and widest else None,
    }


def _linear_biases(arch: ModelArchitecture) -> set[bool]:
    """Whether the linears have biases that one argument stands for: of the attention's output, MLPs, experts and routers."""
    biases = {arch.attention_output_bias}
    if arch.dense_layers or arch.shared_expert_layers:
        biases.add(arch.mlp_bias)
    if arch.experts is not None:
        biases |= {arch.experts.bias, arch.experts.router_bias}
    return biases


def beyond_megatron_lm(arch: ModelArchitecture) -> Iterator[str]:
    """What of a model Megatron-LM's arguments cannot say, so that a model built from them alone computes something else."""
    if isinstance(arch, ForeignArchitecture):
        yield "what it computes: it was built by another package, and its sizes alone are known"
        return
    named = {
        "soft caps of scores": arch.attention_softcap is not None,
        "soft caps of logits": arch.logit_softcap is not None,
        "norms after attention and MLP": arch.post_norm or not arch.pre_norm,
        "queries and keys normed over all heads": arch.qk_norm_whole,
        "gated GELU": arch.activation == "gelu_tanh",
        "multipliers of embeddings": arch.embedding_multiplier != 1.0,
        "multipliers of residuals": arch.residual_multiplier != 1.0,
        "multipliers of logits": arch.logit_multiplier != 1.0,
        "a factor of scores of its own": not _is_usual_scale(arch),
        "biases of some linears": len(_linear_biases(arch)) > 1 or (True in _linear_biases(arch) and not arch.qkv_bias),
        "an epsilon of its own for norms of latents": arch.latent is not None
        and arch.latent.norm_epsilon != arch.layernorm_epsilon,
        "windows of several sizes": len({kind.window for kind in arch.layer_kinds if kind.window is not None}) > 1,
        "several ropes": len(arch.ropes) > 1,
    }
    yield from (name for name, is_had in named.items() if is_had)
    yield from _rope_beyond(arch.ropes[0], has_latents=arch.latent is not None)


def _is_usual_scale(arch: ModelArchitecture) -> bool:
    return arch.attention_scale is None or math.isclose(arch.attention_scale, arch.kv_channels**-0.5)


def _rope_beyond(rope: Rope, *, has_latents: bool) -> Iterator[str]:
    scaling, factor = rope.scaling, rope.attention_factor
    if isinstance(scaling, LongRopeScaling):
        yield "longrope"
    elif isinstance(scaling, Llama3Scaling) and scaling != _MEGATRON_LLAMA3:
        yield "llama3's rotary scaling by other numbers than 8, 1, 4 and 8192"
    elif isinstance(scaling, YarnScaling) and (has_latents or not math.isclose(factor, 0.1 * math.log(scaling.factor) + 1.0)):
        yield "yarn with a factor of its own"
    elif not isinstance(scaling, YarnScaling) and factor != 1.0:
        yield "a factor of turned queries and keys"


def _whole(number: float) -> float:
    """A whole number as an int, which Megatron-LM's parser makes of it."""
    return int(number) if float(number).is_integer() else number
