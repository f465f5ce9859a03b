"""Models with an adapter merged into them: bit for bit what PEFT makes, whatever the adapter's form and the files' dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.merging import cli
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


def test_in_a_wider_dtype_it_is_the_merge_of_a_model_loaded_so_and_large_models_lie_in_several_files(tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "mixtral", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, **SPARSE)
    expected = merged_by_peft(tmp_path / "theirs", base, adapter, torch.float32)
    merge_adapter(adapter, tmp_path / "ours", dtype=torch.float32, max_shard_bytes=2e5)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((tmp_path / "ours" / file) in files for file in index.values())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "float32"


def test_the_tool_takes_another_base_model_and_says_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_hf_model(tmp_path / "base", "llama2")
    adapter = make_adapter(tmp_path / "adapter", base)
    (base / "tokenizer.json").write_text("{}")
    base = base.rename(tmp_path / "moved")

    def run(*flags: object) -> tuple[int, str]:
        code = cli.main([*map(str, flags)])
        return code, "".join(capsys.readouterr())

    code, said = run("--load-adapter", adapter, "--save-hf", tmp_path / "out")
    assert (code, "--base-hf DIR" in said) == (1, True)
    code, said = run("--load-adapter", base, "--save-hf", tmp_path / "out")
    assert (code, "holds no adapter" in said) == (1, True)
    other = write_hf_model(tmp_path / "other", "qwen2")
    code, said = run("--load-adapter", adapter, "--save-hf", tmp_path / "out", "--base-hf", other)
    assert (code, "which has shape" in said) == (1, True)
    monkeypatch.setattr("megatron_rmipo.checkpoint.merging.merged_model.write_index", _full_disk)
    code, said = run("--load-adapter", adapter, "--save-hf", tmp_path / "out", "--base-hf", base)
    assert (code, "no space" in said) == (1, True)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "moved", "other"]
    code, said = run("--load-adapter", adapter, "--save-hf", tmp_path / "out", "--base-hf", base)
    assert code == 0
    assert f"{tmp_path / 'out'} written" in said
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    code, said = run("--load-adapter", adapter, "--save-hf", tmp_path / "out", "--base-hf", base)
    assert (code, "exists and holds" in said) == (1, True)


def _full_disk(*_: object) -> None:
    raise OSError("no space left on device")
