"""Models with an adapter merged into them: bit for bit what PEFT makes, whatever the adapter's form and the files' dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.merging.merged_model import merge_adapter
from tests.checkpoint.adapters import EXPERTS, make_adapter, merged_by_peft
from tests.checkpoint.models import write_hf_model

PATTERNS = {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2}}
BOTH_TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
SPARSE = {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "mlp.gate_proj.weight"]}


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings", "adapter_dtype"),
    [
        ("llama2", {}, torch.bfloat16),
        ("llama2", {"use_dora": True, **PATTERNS}, torch.float32),
        ("qwen2", {"use_rslora": True, **PATTERNS}, torch.float32),
        ("qwen2", {"bias": "all"}, torch.float32),
        ("qwen2_tied", {"use_dora": True, **BOTH_TIED}, torch.bfloat16),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "modules_to_save": ["lm_head"]}, torch.float32),
        ("qwen3_moe", {**SPARSE, "use_rslora": True, "rank_pattern": {"experts.down_proj": 2}}, torch.float32),
        ("mixtral", {**SPARSE, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}, torch.bfloat16),
        ("mixtral", {**SPARSE, "target_parameters": ["mlp.experts.down_proj"]}, torch.float32),
        ("gpt_oss", {**SPARSE, "target_parameters": EXPERTS}, torch.float32),
    ],
)
def test_the_tensors_are_those_of_peft_s_merge(
    tmp_path: Path, kind: str, settings: dict[str, Any], adapter_dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    base = write_hf_model(tmp_path / "base", kind, dtype=base_dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dtype=adapter_dtype, **settings)
    expected = merged_by_peft(tmp_path / "theirs", base, adapter)
    merge_adapter(adapter, tmp_path / "ours")
    found, plain = load_file(tmp_path / "ours" / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, plain[name])]
    assert len(changed) >= 8
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())
