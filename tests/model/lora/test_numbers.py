"""Numbers in adapters against those that PEFT trains, and by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.lora.numbers import AdapterNumbers, describe_trained, layer_adapters, num_trained
from megatron_rmipo.planning.shapes import read_shape
from tests.checkpoint.models import write_hf_model

LLAMA, QWEN3_MOE = read_shape("llama3-8b"), read_shape("qwen3-30b-a3b")
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("llama31", {}, {"target_modules": "all-linear"}),
        ("phi3", {}, {"target_modules": "all-linear"}),
        ("qwen3", {"use_dora": True}, {"target_modules": "all-linear", "use_dora": True}),
        (
            "llama_biases",
            {"lora_target_modules": ["v_proj"], "lora_modules_to_save": ["embed_tokens", "model.norm"]},
            {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
        ),
        ("mixtral", {"lora_target_modules": ["o_proj", "gate_up_proj", "experts.down_proj"]}, EXPERTS),
        ("qwen2_moe", {"lora_target_modules": ["o_proj", "experts.gate_up_proj", "experts.down_proj"]}, EXPERTS),
    ],
)
def test_as_many_are_trained_as_by_peft(tmp_path: Path, kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    directory = write_hf_model(tmp_path, kind)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), PeftConfig(r=3, task_type="CAUSAL_LM", **theirs))
    trained, _ = model.get_nb_trainable_parameters()
    assert num_trained(read_architecture(directory), LoraConfig(lora_rank=3, **ours)) == trained


def test_what_tensor_parallelism_cuts() -> None:
    lora, hidden, ffn, query, key = LoraConfig(lora_rank=16), 4096, 14336, 4096, 1024
    # Of column-parallel matrices B, of row-parallel ones A.
    cut = 16 * (query + 2 * key + query + 2 * ffn + ffn)
    whole = 16 * (3 * hidden + hidden + 2 * hidden + hidden)
    assert layer_adapters(LLAMA, lora) == (AdapterNumbers(cut, whole),) * 32
    # Key/value heads that cannot be dealt out.
    uneven = layer_adapters(LLAMA, lora, 16)[0]
    assert uneven == AdapterNumbers(cut - 16 * (query + 2 * key), whole + 16 * (query + 2 * key))
    only = layer_adapters(LLAMA, LoraConfig(lora_rank=2, use_dora=True, lora_target_modules=["layers.3.self_attn.k_proj"]))
    assert only == (AdapterNumbers(),) * 3 + (AdapterNumbers(3 * key, 2 * hidden),) + (AdapterNumbers(),) * 28


def test_experts_have_one_each_or_share_one() -> None:
    arch = dataclasses.replace(QWEN3_MOE, num_layers=1)
    lora = LoraConfig(lora_rank=4, lora_target_modules=["gate_up_proj", "down_proj"])
    cut, whole = 4 * (2 * 768 + 768), 4 * (2048 + 2048)
    assert layer_adapters(arch, lora) == (AdapterNumbers(expert_cut=128 * cut, expert_whole=128 * whole),)
    shared = dataclasses.replace(lora, lora_experts="shared")
    assert layer_adapters(arch, shared) == (AdapterNumbers(whole=cut + whole),)


def test_what_is_trained_is_told() -> None:
    over = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    told = f"adapter of rank 16 over {over}: 41.9 M of 8.03 B numbers are trained (0.52 %)"
    assert describe_trained(LLAMA, LoraConfig(lora_rank=16)) == told
    some = LoraConfig(lora_rank=8, use_dora=True, lora_target_regex=r".*\.[12]\..*\.[qv]_proj", lora_modules_to_save=["lm_head"])
    assert describe_trained(LLAMA, some).startswith(
        "DoRA adapter of rank 8 over q_proj, v_proj of 2 of 32 layers, and lm_head whole: 526 M of 8.03 B"
    )
