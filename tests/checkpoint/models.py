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
    "initializer_range": 0.3,
}

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 4,
}

# Kind -> its model_type, and what its config says besides.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama31": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama32_tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6, "bos_token_id": None}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3_tied": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True, "bos_token_id": None}),
    # All layers dense.
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "q_lora_rank": 20}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "q_lora_rank": None, "num_key_value_heads": None}),
    "mistral": ("mistral", {"sliding_window": 64, "head_dim": 12, "rope_theta": 10000.0}),
}
KINDS = tuple(_KINDS)


def write_hf_model(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any) -> Path:
    """Save a random model of ``kind`` in ``directory`` with transformers, and return the directory."""
    torch.manual_seed(seed)
    model_type, extra = _KINDS[kind]
    settings = {**_COMMON, **extra, **changes}
    shard_size = settings.pop("max_shard_size", "5GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
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
