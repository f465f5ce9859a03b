"""Tiny Hugging Face models of every supported kind, with odd sizes, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

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

KINDS = ("llama2", "llama31", "llama32_tied", "mistral")


def write_hf_model(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any) -> Path:
    """Save a random model of ``kind`` in ``directory`` with transformers, and return the directory."""
    torch.manual_seed(seed)
    settings = {**_COMMON, **changes}
    shard_size = settings.pop("max_shard_size", "5GB")
    if kind == "mistral":
        model: Any = MistralForCausalLM(
            MistralConfig(**{"sliding_window": 64, "head_dim": 12, "rope_theta": 10000.0, **settings})
        )
    else:
        extra: dict[str, Any] = {
            "llama2": {"num_key_value_heads": 6, "rms_norm_eps": 1e-5},
            "llama31": {"rope_parameters": LLAMA3_ROPE},
            "llama32_tied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        }[kind]
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **extra}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory
