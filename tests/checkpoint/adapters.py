"""Adapters of random numbers, written by PEFT, and what PEFT's own merge makes of their base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint.peft.reading import WEIGHTS_NAME

LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_adapter(directory: Path, base: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Write an adapter, of PEFT's own names and of ``dtype``, whose numbers all change something."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                scale = 0.1 if "lora" in name else 1.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    if dtype is not torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / WEIGHTS_NAME).items()}
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    return directory


def loaded(base: Path, adapter: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The base model with the adapter, as PEFT loads it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


def merged_by_peft(directory: Path, base: Path, adapter: Path, dtype: torch.dtype | str = "auto") -> dict[str, torch.Tensor]:
    """The tensors of the model that PEFT merges and saves in ``directory``."""
    loaded(base, adapter, dtype).merge_and_unload().save_pretrained(directory)
    return load_file(directory / "model.safetensors")
