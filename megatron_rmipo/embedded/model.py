"""A small Llama with random weights, saved the way Hugging Face saves one."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def save_model(directory: Path, tokenizer: transformers.PreTrainedTokenizerBase, seed: int) -> None:
    """Write config, generation config and fp32 safetensors of a Llama-3-shaped model of about a million parameters.

    Args:
        directory: where to; the tokenizer usually stands there too.
        tokenizer: gives vocabulary size and special ids.
        seed: of the weights.
    """
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # So narrow a model starts learning sooner from larger weights than the 0.02 of wide ones.
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
