"""Mistral. Source of the names: ``MistralForCausalLM`` of transformers, which are Llama's; the sliding window has no weights."""

from __future__ import annotations

from megatron_rmipo.checkpoint import llama

MAPPING = llama.MAPPING
