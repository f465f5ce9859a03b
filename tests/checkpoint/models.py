"""Tiny Hugging Face models of every supported kind, with odd sizes, written by transformers itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets
from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint, commit_checkpoint
from megatron_rmipo.checkpoint.megatron.directory import ASSETS_NAME, RANDOM_KEY
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, write_torch_dist

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 100.0}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 30000.0, "factor": 8.0},
    "sliding_attention": LOCAL_ROPE,
}
# Of ropes by type, transformers truncates whatever they say.
OLMO3_ROPES = {
    "full_attention": {name: value for name, value in YARN_ROPE.items() if name != "truncate"},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# Not as transformers would have them where none are listed.
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SMALL_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 2.0],
    "long_factor": [1.0, 3.0, 9.0],
}
MINISTRAL3_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 128},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.1},
}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 1.5}
# Larger scores than others', whose rounding would stand out.
SMALL = {"initializer_range": 0.2}
TIED, NO_PAD = {"tie_word_embeddings": True}, {"pad_token_id": None}
_COMMON: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.3,
}

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 20,
}
# Queries and keys that are turned have another factor than all scores have.
_LATENT_ROPE = {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7}

# Kind -> its model_type, and what its config says besides.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama31": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama32_tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("llama", {"rope_parameters": YARN_ROPE, **SMALL}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6, "bos_token_id": None}),
    # With a window in the second stage's layers and the last of the first, shorter than most prompts and responses.
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3_tied": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True, "bos_token_id": None}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 12, "rope_theta": 10000.0}),
    "olmo2": ("olmo2", {"bos_token_id": None}),
    "olmo2_tied": ("olmo2", {"attention_bias": True, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {"rope_parameters": OLMO3_ROPES, "sliding_window": 5, "initializer_range": 0.2}),
    "olmo3_tied": ("olmo3", {"tie_word_embeddings": True, "sliding_window": 5, "layer_types": MIXED_LAYERS}),
    "gemma": ("gemma", {"head_dim": 20, "attention_bias": True}),
    "gemma_untied": ("gemma", {"head_dim": 10, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 20, "query_pre_attn_scalar": 30, "sliding_window": 5, **SMALL_CAPS}),
    "gemma2_untied": ("gemma2", {"head_dim": 10, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 20, "sliding_window": 5, "layer_types": MIXED_LAYERS, "rope_parameters": GEMMA3_ROPES},
    ),
    "gemma3_untied": ("gemma3_text", {"head_dim": 10, "tie_word_embeddings": False, "final_logit_softcapping": 9.0}),
    "glm": ("glm", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": False}),
    "glm4": ("glm4", {"head_dim": 20, "partial_rotary_factor": 0.3}),
    "glm4_tied": ("glm4", {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 6}),
    # Windows where no rotary embeddings are, as where the config lists neither.
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 6, **NO_PAD}),
    # Not of the attention: without rotary embeddings a bias of keys changes nothing, and has no gradient to compare.
    "smollm3_untied": ("smollm3", {"no_rope_layer_interval": 3, "tie_word_embeddings": False, "mlp_bias": True, **NO_PAD}),
    "phi3": ("phi3", {"sliding_window": 6, "head_dim": 12, **NO_PAD}),
    # As Phi-4-mini: six of eight channels of a head are turned.
    "phi4_mini": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128, **TIED, **NO_PAD}),
    "ministral": (
        "ministral",
        {"sliding_window": 6, "layer_types": MIXED, "head_dim": 12, "rope_parameters": YARN_ROPE, **SMALL},
    ),
    "ministral3": ("ministral3", {"head_dim": 10, "rope_parameters": MINISTRAL3_ROPE, **SMALL}),
    "granite": ("granite", {**GRANITE, **TIED, "rope_parameters": YARN_ROPE}),
    "granite_untied": ("granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "sliding_window": 9},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 36, "bos_token_id": None}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 36},
            # Windows in the first and third layer.
            **{"mlp_only_layers": [1, 2], "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **{"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "norm_topk_prob": True},
            **{"decoder_sparse_step": 2, "head_dim": 20, "tie_word_embeddings": True},
            **{"use_sliding_window": True, "sliding_window": 7},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **{"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24, "head_dim": 20, "sliding_window": 7},
            # So small that many a gate and up is beyond it.
            **{"swiglu_limit": 1.5, "rope_parameters": YARN_ROPE, "initializer_range": 0.2},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **{**_LATENT, "q_lora_rank": None, "num_key_value_heads": None},
            **{"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **{**_LATENT, "q_lora_rank": 20, "rope_parameters": _LATENT_ROPE, "rms_norm_eps": 1e-5, **SMALL},
            **{"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2},
        },
    ),
    # With biases and norms, and one group of experts, as the larger of the published ones.
    "glm4_moe": (
        "glm4_moe",
        {
            **{"head_dim": 12, "attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 2, "n_shared_experts": 1},
            **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "routed_scaling_factor": 2.5},
        },
    ),
}
KINDS = tuple(_KINDS)
MODEL_TYPES = {kind: model_type for kind, (model_type, _) in _KINDS.items()}
# Those with mixtures of experts.
SPARSE_KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe")


def write_hf_model(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any) -> Path:
    """Save a random model of ``kind`` in ``directory`` with transformers, and return the directory."""
    torch.manual_seed(seed)
    model_type, extra = _KINDS[kind]
    settings = {**_COMMON, **extra, **changes}
    shard_size = settings.pop("max_shard_size", "5GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                # Where transformers starts from zeros, one is added to it.
                low = -0.5 if kind.startswith("gemma") else 0.5
                parameter.uniform_(low, low + 1.0)
            elif name.endswith(("bias", "sinks")):
                parameter.uniform_(-0.5, 0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


def write_checkpoint(directory: Path, iteration: int, hf: Path, *, seed: int = 0) -> Path:
    """A checkpoint of a run as it looks from outside, with random tensors, written without a model or process groups."""
    partial = begin_checkpoint(directory, iteration)
    values = torch.randn((3, 5, 7), generator=torch.Generator().manual_seed(1000 * seed + iteration))
    pieces = tuple(Piece((layer, 0, 0), (1, 5, 7), _filling(values[layer : layer + 1])) for layer in range(3))
    objects = [f"{RANDOM_KEY}/shard_0_1"]
    entries = [Entry("decoder.layers.weight", (3, 5, 7), torch.float32, pieces)]
    digests = write_torch_dist(partial, entries, objects, {"iteration": iteration, "checkpoint_version": 3.0})
    copy_hf_assets(hf, partial / ASSETS_NAME)
    return commit_checkpoint(partial, CheckpointRecord(iteration, {"step": iteration}), digests)


def _filling(values: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def fill(target: torch.Tensor) -> None:
        target.copy_(values)

    return fill


def flip_bit(path: Path, seed: int = 0) -> None:
    """Turn over one bit of a file."""
    data = bytearray(path.read_bytes())
    at = random.Random(seed).randrange(len(data))
    data[at] ^= 1 << random.Random(seed + 1).randrange(8)
    path.write_bytes(data)
