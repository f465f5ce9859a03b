"""Small models with random weights, of the architectures that the examples train, saved the way Hugging Face saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    # So narrow a model starts learning sooner from larger weights than the 0.02 of wide ones.
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}
# The model whose architecture it is, in small -> its type, and what differs from the common settings.
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama3": ("llama", {}),
    # Eight queries a key, and layers for two stages.
    "llama3-70b": ("llama", {"num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-moe": (
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
    ),
    # Five layers that see a window, and one that sees everything, through a rope of its own.
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
}


def save_model(directory: Path, tokenizer: transformers.PreTrainedTokenizerBase, seed: int, shape: str = "llama3") -> None:
    """Write config, generation config and fp32 safetensors of a model of about a million parameters.

    Args:
        directory: where to; the tokenizer usually stands there too.
        tokenizer: gives vocabulary size and special ids.
        seed: of the weights.
        shape: one of :data:`SHAPES`.
    """
    model_type, settings = SHAPES[shape]
    config = transformers.AutoConfig.for_model(
        model_type,
        **{**_COMMON, **settings},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
