"""Names of modules against those that PEFT finds by them, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import Experts, ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.targets import layer_targets, modules_to_save, targeted
from megatron_rmipo.planning.shapes import read_shape
from tests.checkpoint.models import write_hf_model
from tests.families.reading import read
from tests.families.test_deepseek import V3

LLAMA, QWEN3_MOE, GPT_OSS = (read_shape(name) for name in ("llama3-8b", "qwen3-30b-a3b", "gpt-oss-120b"))
SHORT_LLAMA = dataclasses.replace(LLAMA, num_layers=2)
SHORT_MOE = dataclasses.replace(QWEN3_MOE, num_layers=2, experts=Experts(3, 2, 768, dense_layers=frozenset({0})))


def hf_modules(arch: ModelArchitecture, lora: LoraConfig) -> list[str]:
    """Hugging Face names of the modules that get an adapter."""
    found = [
        rule.source_names(place)[source].removesuffix(".weight")
        for rule, place, sources in targeted(arch, lora)
        for source in sources
    ]
    assert len(found) == len(set(found))
    return found


@pytest.mark.parametrize("kind", ["llama31", "llama32_tied", "qwen3", "phi3", "gemma2", "glm4", "granite"])
@pytest.mark.parametrize(
    "names",
    [None, ["v_proj", "down_proj", "o_proj"], ["layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"]],
    ids=["all", "suffixes", "longer"],
)
def test_names_are_those_of_peft(tmp_path: Path, kind: str, names: list[str] | None) -> None:
    directory = write_hf_model(tmp_path, kind)
    if kind == "phi3" and names and "v_proj" in names:
        names = ["qkv_proj", "gate_up_proj"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    theirs = get_peft_model(model, PeftConfig(target_modules=names or "all-linear", task_type="CAUSAL_LM"))
    ours = hf_modules(read_architecture(directory), LoraConfig(lora_rank=4, lora_target_modules=names))
    assert sorted(ours) == sorted(theirs.targeted_module_names)


def test_a_regex_narrows_names() -> None:
    lora = LoraConfig(lora_rank=4, lora_target_modules=["linear_qkv", "o_proj"], lora_target_regex=r".*\.1\..*\.[ko]_proj")
    found = [(rule.megatron, place.layer, sources) for rule, place, sources in targeted(SHORT_LLAMA, lora)]
    attention = "decoder.layers.self_attention.linear_"
    assert found == [(attention + "qkv.weight", 1, (1,)), (attention + "proj.weight", 1, (0,))]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["gate_up_proj"], {"fc1": (0, 1)}),
        (["gate_proj", "up_proj"], {"fc1": (0, 1), "dense_fc1": (0, 1)}),
        (["linear_fc2"], {"fc2": (0,), "dense_fc2": (0,)}),
        (["experts.down_proj"], {"fc2": (0,)}),
        (["mlp.gate_proj", "mlp.experts.gate_up_proj"], {"fc1": (0, 1), "dense_fc1": (0,)}),
    ],
)
def test_experts_have_an_adapter_all_or_none(names: list[str], weights: dict[str, tuple[int, ...]]) -> None:
    megatron = {
        **{"fc1": "decoder.layers.mlp.experts.experts.linear_fc1.weight", "dense_fc1": "decoder.layers.mlp.linear_fc1.weight"},
        **{"fc2": "decoder.layers.mlp.experts.experts.linear_fc2.weight", "dense_fc2": "decoder.layers.mlp.linear_fc2.weight"},
    }
    lora = LoraConfig(lora_rank=4, lora_target_modules=names)
    expected = {megatron[name]: sources for name, sources in weights.items()}
    assert {rule.megatron: sources for rule, _, sources in layer_targets(SHORT_MOE, lora)} == expected
    found = [(rule.megatron, place.expert) for rule, place, _ in targeted(SHORT_MOE, lora)]
    assert sorted(found, key=str) == sorted(
        [(name, expert) for name in expected for expert in (range(3) if "experts" in name else (None,))], key=str
    )


def test_latents_are_linear_layers_and_routers_none(tmp_path: Path) -> None:
    arch = dataclasses.replace(read(tmp_path, V3), num_layers=5)
    names = {(layer, rule.megatron.split(".", 2)[2]) for rule, layer, _ in layer_targets(arch, LoraConfig(lora_rank=4))}
    attention = {
        f"self_attention.linear_{name}.weight" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
    }
    dense = {f"mlp.linear_fc{number}.weight" for number in (1, 2)}
    sparse = {f"mlp.{kind}.linear_fc{number}.weight" for number in (1, 2) for kind in ("experts.experts", "shared_experts")}
    assert {name for layer, name in names if layer == 0} == attention | dense
    assert {name for layer, name in names if layer == 4} == attention | sparse
    # By Megatron's name of one.
    (only,) = {rule.sources for rule, *_ in layer_targets(arch, LoraConfig(lora_target_modules=["linear_kv_up_proj"]))}
    assert only == ("model.layers.{layer}.self_attn.kv_b_proj.weight",)


def test_stacked_experts_have_none_but_the_attention_beside_them() -> None:
    with pytest.raises(ConfigError, match=r"gate_up_proj of a gpt_oss model.*--lora-target-modules q_proj"):
        layer_targets(GPT_OSS, LoraConfig(lora_rank=4))
    attention = layer_targets(GPT_OSS, LoraConfig(lora_rank=4, lora_target_regex=r".*\.self_attn\..*"))
    assert {(rule.megatron.split(".")[-2], sources) for rule, _, sources in attention} == {
        ("linear_qkv", (0, 1, 2)),
        ("linear_proj", (0,)),
    }


@pytest.mark.parametrize(
    ("arch", "names", "regex", "message"),
    [
        (LLAMA, ["q_proj", "qkv_proj"], None, "qkv_proj matches no module of a llama model.*all-linear, linear_qkv.*down_proj"),
        (LLAMA, ["proj"], None, "proj matches no module"),
        (LLAMA, ["embed_tokens"], None, "word_embeddings can have no adapter.*--lora-modules-to-save"),
        (LLAMA, ["lm_head"], None, "output_layer can have no adapter"),
        (QWEN3_MOE, ["mlp.gate"], None, "mlp.router can have no adapter"),
        (QWEN3_MOE, ["router"], None, "mlp.router can have no adapter"),
        (LLAMA, ["linear_qkv"], ".*down_proj", "'.*down_proj' matches the whole name of none.*model.layers.31.self_attn.q_proj"),
        (LLAMA, None, "q_proj", "matches the whole name of none"),
        (LLAMA, None, "(q_proj", r"'\(q_proj' is no regular expression"),
        (SHORT_MOE, ["up_proj"], None, "name a part of layer 1's experts, not model.layers.1.mlp.experts.0.gate_proj"),
        (SHORT_MOE, ["experts.1.down_proj"], None, "a part of layer 1's experts"),
        (SHORT_MOE, None, r".*\.(mlp\.experts\.[01]|self_attn)\..*", "a part of layer 1's experts"),
    ],
)
def test_what_names_nothing(arch: ModelArchitecture, names: list[str] | None, regex: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_targets(arch, LoraConfig(lora_rank=4, lora_target_modules=names, lora_target_regex=regex))


def test_modules_that_are_trained_whole() -> None:
    lora = LoraConfig(
        lora_rank=4,
        lora_target_modules=["linear_qkv"],
        lora_modules_to_save=["embed_tokens", "norm", "layers.1.post_attention_layernorm", "gate", "o_proj"],
    )
    found = [rule.source_names(place) for rule, place in modules_to_save(SHORT_MOE, lora)]
    assert [name for (name,) in found] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.norm.weight",
    ]
    assert modules_to_save(SHORT_MOE, LoraConfig(lora_rank=4)) == ()


@pytest.mark.parametrize(
    ("arch", "name", "message"),
    [
        (LLAMA, "head", "head names no module.*There are: embed_tokens, input_layernorm, o_proj, .*norm, lm_head"),
        (LLAMA, "q_proj", "q_proj is not one weight of its own"),
        (LLAMA, "down_proj", "down_proj has an adapter"),
        (QWEN3_MOE, "gate_up_proj", "names no module"),
        (GPT_OSS, "o_proj", "o_proj is not one weight of its own"),
        (dataclasses.replace(LLAMA, tied_embeddings=True), "embed_tokens", "the output layer of this model is its embedding"),
        (dataclasses.replace(LLAMA, tied_embeddings=True), "lm_head", "the output layer of this model is its embedding"),
    ],
)
def test_what_cannot_be_trained_whole(arch: ModelArchitecture, name: str, message: str) -> None:
    regex = r".*\.q_proj" if arch is GPT_OSS else r".*\.([qkv]_proj|down_proj)"
    lora = LoraConfig(lora_rank=4, lora_target_regex=regex, lora_modules_to_save=[name])
    with pytest.raises(ConfigError, match=message):
        modules_to_save(arch, lora)
