"""LoRA adapters: what is read of the base model is what PEFT's merge makes of it, and other kinds are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, model_directory, read_adapter
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.makers import KnownFamilies, maker_of
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from tests.checkpoint.models import write_hf_model

LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def make_adapter(directory: Path, base: Path, **settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of random weights, written by PEFT; what PEFT's own merge makes of the base model."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "lora" in name else 1.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    merged = adapted.merge_and_unload().state_dict()
    return directory, {name: tensor.clone() for name, tensor in merged.items()}


def read_all(directory: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """Every tensor, by rows from the second on, and matrices by some of their columns, too."""
    files = open_weights(directory, read_architecture(model_directory(directory, base)), base)
    found = {}
    for name, stored in files.tensors.items():
        whole = torch.empty(stored.shape, dtype=torch.float32)
        files.read(name, 0, whole[:1])
        files.read(name, 1, whole[1:])
        if len(stored.shape) == 2:
            part = torch.empty((stored.shape[0] - 1, 3), dtype=torch.float32)
            files.read(name, 1, part, slice(2, 5))
            torch.testing.assert_close(part, whole[1:, 2:5], rtol=1e-6, atol=1e-7)
        found[name] = whole
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama2", {}),
        ("qwen2", {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2}, "bias": "all"}),
        ("qwen2_tied", {"rank_pattern": {"o_proj": 5}, "modules_to_save": ["embed_tokens"]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_weights_are_those_of_peft_s_merge(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = write_hf_model(tmp_path / "base", kind)
    adapter, expected = make_adapter(tmp_path / "adapter", base, **settings)
    found = read_all(adapter)
    plain = read_all(base)
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        if name in expected:  # parts of joined tensors have names of ours
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in found.items()) >= 12
    # The converters take it, too: out comes the merged model, with the base model's config.
    convert_hf_to_megatron(adapter, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "llama2")
    adapter, expected = make_adapter(tmp_path / "adapter", base)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    changes = read_adapter(adapter).changes
    files = open_weights(adapter, read_architecture(base))
    name = "model.layers.2.mlp.down_proj.weight"
    found = torch.empty(expected[name].shape, dtype=torch.bfloat16)
    files.read(name, 0, found)
    exact = half[name].double() + changes[name].scale * changes[name].b.double() @ changes[name].a.double()
    wrong = int((found != exact.to(torch.bfloat16)).sum())
    assert wrong <= exact.numel() // 1000, "numbers that fp32 puts on the other side of a tie alone"


def written(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, **config}))
    save_file(tensors, directory / WEIGHTS_NAME)
    return directory


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights is 'pissa_niter_4'"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (3, 203)}, "lora_embedding_A is no factor"),
        ({}, {f"{QUERY}.lora_A.weight": (3, 48)}, "q_proj has lora_A"),
        ({}, {f"{QUERY}.lora_A.weight": (3, 48), f"{QUERY}.lora_B.weight": (50, 3)}, "[50, 48], which has shape [48, 48]"),
        ({}, {"base_model.model.score.weight": (1, 48)}, "score.weight [1, 48], which is none of its tensors"),
        ({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}, {}, "Name that of its base model with --base-hf DIR"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    base = write_hf_model(tmp_path / "base", "llama2")
    config = {"base_model_name_or_path": str(base), **config}
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    adapter = written(tmp_path / "adapter", config, made)
    maker = KnownFamilies()
    with pytest.raises(ConversionError) as caught:
        maker.check_weights(adapter, maker.read(adapter))
    assert said in str(caught.value)


def test_the_base_model_may_be_named_and_a_flag_for_nothing_is_refused(tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "llama2")
    factors = {f"{QUERY}.lora_A.weight": torch.ones(3, 48), f"{QUERY}.lora_B.weight": torch.ones(48, 3)}
    adapter = written(tmp_path / "adapter", {"base_model_name_or_path": "of/the-hub", "r": 3}, factors)
    found: Adapter = read_adapter(adapter)
    assert found.changes["model.layers.0.self_attn.q_proj.weight"].scale == pytest.approx(4 / 3)
    maker = maker_of(Config(model=ModelConfig(load_hf=str(adapter), base_hf=str(base))))
    assert maker.config_of(adapter) == base
    maker.check_weights(adapter, maker.read(adapter))
    with pytest.raises(ConversionError, match="holds no adapter"):
        maker_of(Config(model=ModelConfig(load_hf=str(base), base_hf=str(base))))
