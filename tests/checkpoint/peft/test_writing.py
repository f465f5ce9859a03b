"""Adapters written: PEFT loads them, without a word, as those that it wrote itself, and so do we."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.peft.factors import stack_experts
from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from megatron_rmipo.checkpoint.peft.writing import write_adapter
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.adapters import AdapterForm
from tests.checkpoint.adapters import EXPERTS, loaded, make_adapter
from tests.checkpoint.models import write_hf_model

TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
# Among the target modules of a sparse model PEFT takes gate_proj for the experts'; a dense layer's is named as a parameter.
SPARSE = {"target_parameters": [*EXPERTS, "mlp.gate_proj.weight"], "target_modules": ["q_proj", "v_proj"]}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama2", {"use_dora": True, "modules_to_save": ["lm_head"], "layers_to_transform": [1, 3]}),
    ("qwen2", {"use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"q_proj": 5.5}}),
    ("qwen2_tied", {"target_modules": r".*layers\.(0|2)\..*(q|v)_proj", **TIED}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "exclude_modules": ["layers.1.mlp.gate_up_proj"]}),
    ("qwen3_moe", {**SPARSE, "rank_pattern": {"down_proj": 2}}),
    ("mixtral", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}),
]


def write_again(directory: Path, adapter: Path) -> Path:
    """What was read of an adapter, taken apart into experts, put together and written."""
    read = read_adapter(adapter)
    factors = {}
    for name, its in read.factors.items():
        a, b = its.a, its.b
        if its.num_experts is not None:
            a, b = stack_experts([(one.a, one.b) for one in map(its.of_expert, range(its.num_experts))])
        factors[name] = {"lora_A": a, "lora_B": b}
        if its.magnitude is not None:
            factors[name]["lora_magnitude_vector"] = its.magnitude
    write_adapter(directory, read.form, factors, read.read_whole())
    return directory


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_what_peft_wrote_comes_out_bit_for_bit_and_is_loaded_alike(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = write_hf_model(tmp_path / "base", kind)
    theirs = make_adapter(tmp_path / "theirs", base, **settings)
    ours = write_again(tmp_path / "ours", theirs)
    expected, found = load_file(theirs / WEIGHTS_NAME), load_file(ours / WEIGHTS_NAME)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(ours / WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    said, meant = json.loads((ours / CONFIG_NAME).read_text()), json.loads((theirs / CONFIG_NAME).read_text())
    assert set(said) <= set(meant)
    tokens = torch.arange(3, 20)[None]
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        logits = [loaded(base, directory)(tokens).logits for directory in (ours, theirs)]
    assert torch.equal(*logits)
    assert not [text for text in map(str, (item.message for item in caught)) if "keys" in text and "rank_pattern" not in text]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_form_is_that_of_peft_s_config(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    import peft

    base = write_hf_model(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    form = read_adapter(adapter).form
    assert AdapterForm.from_config(form.to_config()) == form
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / CONFIG_NAME).write_text(json.dumps(form.to_config()))
    ours, theirs = (peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "adapter"))
    for config in (ours, theirs):
        for name in ("rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save"):
            config[name] = config[name] or None
        config["peft_version"] = None
        for name, value in config.items():
            config[name] = sorted(value) if isinstance(value, set | list) else value
    assert ours == theirs
    # It targets what PEFT targets, and nothing else.
    model = loaded(base, adapter)
    layers = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    stacks = [name for name in layers if name.endswith(("experts", "experts.base_layer"))]
    names = [name for name, module in model.unload().named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name for name in names if form.targets(name)} == set(layers) - set(stacks)
    modules = {name.removesuffix(".base_layer") for name in stacks}
    assert sum(len(form.expert_parameters_of(name)) for name in modules) == len(stacks)


def test_a_directory_that_holds_something_is_refused_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    form = AdapterForm(rank=2, alpha=4, target_modules=("q_proj",))
    factors = {"model.layers.0.self_attn.q_proj": {"lora_A": torch.ones(2, 5), "lora_B": torch.ones(5, 2)}}
    write_adapter(tmp_path / "adapter", form, factors, {})
    with pytest.raises(ConversionError, match="exists and holds"):
        write_adapter(tmp_path / "adapter", form, factors, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="--save-adapter"):
        write_adapter(tmp_path / "file" / "adapter", form, factors, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]
