"""Flags of adapters that do not go together, each named with what would work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rmipo.config.flag_problems import adapter_problems
from megatron_rmipo.config.flags.lora import LoraConfig, lora_problems
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import CheckpointConfig, Config, ExpertsConfig, ModelConfig

ON: dict[str, Any] = {"lora_rank": 4}
# Flags of adapters alone -> words of what is said.
ALONE: list[tuple[dict[str, Any], list[str]]] = [
    ({"lora_alpha": 8.0}, ["--lora-alpha does nothing without --lora-rank N or --load-adapter DIR"]),
    ({"save_adapter": "out"}, ["--save-adapter does nothing without"]),
    ({"lora_rank": 0}, ["--lora-rank 0", "1 or more"]),
    ({**ON, "lora_alpha": -1.0}, ["--lora-alpha -1.0", "greater than 0"]),
    ({**ON, "lora_dropout": 0.1}, ["--lora-dropout 0.1", "how its batch is cut"]),
    ({**ON, "lora_plus_ratio": 0.0}, ["--lora-plus-ratio 0.0", "greater than 0"]),
    ({**ON, "lora_target_modules": []}, ["--lora-target-modules names none"]),
    ({"load_adapter": "somewhere", "lora_rank": 8}, ["--lora-rank is what the adapter in --load-adapter says"]),
    ({"load_adapter": "somewhere", "use_dora": True}, ["--use-dora is what the adapter in --load-adapter says"]),
]
# Flags beside --lora-rank -> words of what is said.
BESIDE: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": ModelConfig(load_hf="a"), "lora": {"pretrained_checkpoint": "b"}}, ["--load-hf", "--pretrained-checkpoint"]),
    ({"model": ModelConfig(reference_hf="a"), "lora": {"reference_adapter": "b"}}, ["--reference-adapter", "--reference-hf"]),
    ({"model": ModelConfig(bridge="megatron-bridge")}, ["--bridge", "all trained"]),
    ({"model": ModelConfig(fp8_format="hybrid")}, ["--fp8-format"]),
    ({"memory": MemoryConfig(use_precision_aware_optimizer=True)}, ["--use-precision-aware-optimizer"]),
    ({"experts": ExpertsConfig(moe_router_bias_update_rate=0.1)}, ["--moe-router-bias-update-rate", "score biases"]),
    ({"checkpoint": CheckpointConfig(save_hf="out"), "lora": {"quantize_base": "nf4"}}, ["--save-hf", "tools/merge_adapter.py"]),
    (
        {
            "model": ModelConfig(bf16=True),
            "parallel": ParallelConfig(overlap_param_gather=True),
            "lora": {"lora_modules_to_save": ["lm_head"]},
        },
        ["--overlap-param-gather", "--lora-modules-to-save", "--bf16"],
    ),
]


@pytest.mark.parametrize(("flags", "words"), ALONE)
def test_flags_of_adapters_that_cannot_be_are_named(flags: dict[str, Any], words: list[str]) -> None:
    said = "\n".join(lora_problems(LoraConfig(**flags)))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(("sections", "words"), BESIDE)
def test_flags_beside_an_adapter_that_cannot_be_are_named(sections: dict[str, Any], words: list[str]) -> None:
    sections = dict(sections)
    own = sections.pop("lora", {})
    said = list(adapter_problems(Config(lora=LoraConfig(**ON, **own), **sections)))
    assert len(said) == 1
    assert all(word in said[0] for word in words), said
    assert not list(adapter_problems(Config(**sections))), "without an adapter they may be"


def test_an_adapter_alone_is_no_problem() -> None:
    assert not list(lora_problems(LoraConfig(**ON)))
    assert not list(lora_problems(LoraConfig(load_adapter="somewhere")))
    assert not list(lora_problems(LoraConfig()))


def test_what_a_loaded_adapter_says_is_no_flag_that_was_given() -> None:
    lora = LoraConfig(load_adapter="somewhere").filled_in(lora_rank=8, lora_alpha=16.0)
    assert not list(lora_problems(lora))
    assert (lora.as_given()["lora_rank"], lora.as_given()["lora_alpha"]) == (None, None)
    assert Config(lora=lora).to_flat_dict()["lora_rank"] is None
