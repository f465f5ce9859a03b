"""Adapters: any part that is read of the base model is what PEFT's merge makes of it; what is not merged is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.makers import KnownFamilies, maker_of
from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, WEIGHTS_NAME, Adapter, model_directory, read_adapter
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from tests.checkpoint.adapters import EXPERTS, make_adapter, merged_by_peft
from tests.checkpoint.models import write_hf_model


def read_all(directory: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """Every tensor, by rows from the second on, and matrices by some of their columns, too."""
    files = open_weights(directory, read_architecture(model_directory(directory, base)), base)
    found = {}
    for name, stored in files.tensors.items():
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        files.read(name, 0, whole[:1])
        files.read(name, 1, whole[1:])
        if len(stored.shape) == 2:
            for columns in (slice(2, 5), slice(stored.shape[1] - 1, stored.shape[1])):
                part = torch.empty_like(whole[1:, columns])
                files.read(name, 1, part, columns)
                assert torch.equal(part, whole[1:, columns]), name
        found[name] = whole
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama2", {"use_dora": True}),
        ("qwen2", {"r": 16, "use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}, "bias": "all"}),
        ("qwen2_tied", {"rank_pattern": {"o_proj": 9}, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "modules_to_save": ["lm_head"], "r": 8}),
        ("qwen3_moe", {"target_parameters": [*EXPERTS, "mlp.up_proj.weight"], "target_modules": ["q_proj", "v_proj"], "r": 8}),
    ],
)
def test_parts_of_weights_are_those_of_peft_s_merge(
    tmp_path: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    base = write_hf_model(tmp_path / "base", kind, dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    expected = merged_by_peft(tmp_path / "theirs", base, adapter)
    found, plain = read_all(adapter), read_all(base)
    assert found.keys() == plain.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in found.items()) >= 12
    # The converters take it, too: out comes the merged model, with the base model's config.
    convert_hf_to_megatron(adapter, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["llama2", "gpt_oss"])
def test_read_into_a_wider_dtype_the_sum_is_that_of_a_model_loaded_so(tmp_path: Path, kind: str) -> None:
    base = write_hf_model(tmp_path / "base", kind, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"target_parameters": EXPERTS, "target_modules": ["q_proj"]} if kind == "gpt_oss" else {}
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    expected = merged_by_peft(tmp_path / "theirs", base, adapter, torch.float32)
    convert_hf_to_megatron(adapter, tmp_path / "megatron", dtype="float32")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def per_expert(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """An adapter of stacks of experts as one where every expert's matrices were modules: B of gate and up, apart."""
    found = {}
    for name, tensor in tensors.items():
        if ".experts.base_layer.lora_A" not in name and ".experts.lora_A" not in name:
            if ".experts." not in name:
                found[name] = tensor
            continue
        inner, a, b = ".base_layer" in name, tensor, tensors[name.replace("lora_A", "lora_B")]
        experts, number = name.split(".base_layer")[0].split(".lora_A")[0], a.shape[0] // rank
        for expert in range(number):
            own_a, own_b = a.reshape(number, rank, -1)[expert], b.reshape(b.shape[0], rank, number)[:, :, expert]
            halves = own_b.chunk(2) if inner else (own_b,)
            for module, half in zip(("gate_proj", "up_proj") if inner else ("down_proj",), halves, strict=True):
                found[f"{experts}.{expert}.{module}.lora_A.weight"] = own_a.clone()
                found[f"{experts}.{expert}.{module}.lora_B.weight"] = half.clone()
    return found


def test_adapters_of_experts_that_were_modules_are_read(tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "qwen3_moe", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_parameters=EXPERTS, target_modules=["q_proj"])
    expected = read_all(adapter)
    older = per_expert(load_file(adapter / WEIGHTS_NAME), 3)
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"base_model_name_or_path": str(base), "r": 3, "lora_alpha": 7, "target_modules": names}
    found = read_all(written(tmp_path / "older", config, older))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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
        ({"use_qalora": True}, {}, "use_qalora is True"),
        ({"lora_alpha": "much"}, {}, "lora_alpha is 'much'"),
        ({"use_dora": True}, {f"{QUERY}.lora_A.weight": (3, 48), f"{QUERY}.lora_B.weight": (48, 3)}, "and lora_magnitude_vector"),
        (
            {"target_parameters": ["experts.down_proj"]},
            {"base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight": (3, 48)},
            "experts has 1 pairs of factors",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights is 'pissa_niter_4'"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (3, 203)}, "lora_embedding_A is no factor of a weight"),
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


@pytest.mark.parametrize(
    ("config", "inner", "outer", "said"),
    [
        ({}, (48, 56), (48, 28), r"transposed weights \[10, 48, 56\]"),
        ({"peft_version": "0.18.1"}, (56, 48), (48, 48), r"experts\.down_proj, whose weights are square"),
        ({"peft_version": "0.19.1"}, (56, 48), (48, 48), r"\[10, 48, 48\], which has shape \[10, 48, 28\]"),
        ({"r": 4}, (56, 48), (48, 28), "no multiple of the rank 4"),
    ],
)
def test_factors_of_experts_as_early_versions_wrote_them_are_refused(
    tmp_path: Path, config: dict[str, Any], inner: tuple[int, int], outer: tuple[int, int], said: str
) -> None:
    base = write_hf_model(tmp_path / "base", "qwen3_moe")
    experts, tensors = "base_model.model.model.layers.1.mlp.experts", {}
    for module, (rows, columns) in ((f"{experts}.base_layer", inner), (experts, outer)):
        tensors[f"{module}.lora_A.weight"] = torch.ones(30, columns)
        tensors[f"{module}.lora_B.weight"] = torch.ones(rows, 30)
    config = {"base_model_name_or_path": str(base), "r": 3, "target_parameters": EXPERTS, **config}
    with pytest.raises(ConversionError, match=said):
        open_weights(written(tmp_path / "adapter", config, tensors), read_architecture(base))


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_an_adapter_that_unties_embeddings_is_refused(tmp_path: Path, saved: str) -> None:
    base = write_hf_model(tmp_path / "base", "qwen2_tied")
    adapter = make_adapter(tmp_path / "adapter", base, modules_to_save=[saved])
    with pytest.raises(ConversionError, match=f"{saved}.weight whole and unties"):
        open_weights(adapter, read_architecture(base))


def test_the_base_model_may_be_named_and_a_flag_for_nothing_is_refused(tmp_path: Path) -> None:
    base = write_hf_model(tmp_path / "base", "llama2")
    factors = {f"{QUERY}.lora_A.weight": torch.ones(3, 48), f"{QUERY}.lora_B.weight": torch.ones(48, 3)}
    adapter = written(tmp_path / "adapter", {"base_model_name_or_path": "of/the-hub", "r": 3}, factors)
    found: Adapter = read_adapter(adapter)
    assert found.factors["model.layers.0.self_attn.q_proj"].scale == pytest.approx(4 / 3)
    maker = maker_of(Config(model=ModelConfig(load_hf=str(adapter), base_hf=str(base))))
    assert maker.config_of(adapter) == base
    maker.check_weights(adapter, maker.read(adapter))
    with pytest.raises(ConversionError, match="holds no adapter"):
        maker_of(Config(model=ModelConfig(load_hf=str(base), base_hf=str(base))))
