"""Rotary frequencies and factors against those of transformers, over random parameters of every type."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import LinearScaling, ModelArchitecture, Rope
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.rope import latent_score_factor, read_partial_rope, read_rope
from megatron_rmipo.model.rotary import PackedRotary, rotary_inverse_frequencies

SETS = 60


def parameters(kind: str, choose: random.Random, channels: int) -> dict[str, Any]:
    """What a config says of embeddings of a kind; whatever may be left out is now and then."""

    def perhaps(**fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if choose.random() < 0.5}

    factor, context = {"factor": choose.uniform(1.0, 40.0)}, {"original_max_position_embeddings": choose.randrange(17, 9000)}
    match kind:
        case "default":
            return {}
        case "linear" | "dynamic":
            return factor
        case "llama3":
            low = choose.uniform(0.5, 2.0)
            return {**factor, **context, "low_freq_factor": low, "high_freq_factor": low + choose.uniform(0.5, 4.0)}
        case "yarn":
            ramp = perhaps(beta_fast=choose.uniform(8, 64), beta_slow=choose.uniform(0.25, 4), truncate=choose.random() < 0.5)
            sizes = perhaps(mscale=choose.uniform(0.5, 1.5), mscale_all_dim=choose.choice([0, 0.707, 1.0]))
            return {**factor, **context, **ramp, **sizes, **perhaps(attention_factor=choose.uniform(0.5, 2.0))}
        case _:
            lists = {name: [choose.uniform(1.0, 50.0) for _ in range(channels // 2)] for name in ("short_factor", "long_factor")}
            return {**lists, **context, **perhaps(**factor, attention_factor=choose.uniform(0.5, 2.0))}


def spelled_before(rope: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    """The same as configs of transformers 4 say it."""
    rest = {choose.choice(["type", "rope_type"]) if name == "rope_type" else name: value for name, value in rope.items()}
    theta = rest.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": rest if len(rest) > 1 else None}


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies_and_factor_are_those_of_transformers(kind: str) -> None:
    choose = random.Random(kind)
    for number in range(SETS):
        channels = 2 * choose.randrange(3, 70)
        rope = {"rope_type": kind, "rope_theta": choose.uniform(1e3, 1e7), **parameters(kind, choose, channels)}
        config = {"max_position_embeddings": choose.randrange(9000, 200000), "head_dim": channels}
        theirs = LlamaConfig(**config, rope_parameters=json.loads(json.dumps(rope)))
        written = {"rope_parameters": rope} if number % 2 else spelled_before(rope, choose)
        found = read_rope(Fields({**config, **written}, {}, Path("config.json")))
        if kind == "default":
            expected, factor = 1.0 / rope["rope_theta"] ** (torch.arange(0, channels, 2) / channels), 1.0
        else:
            expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs)
        torch.testing.assert_close(rotary_inverse_frequencies(found, channels), expected, rtol=2e-6, atol=0)
        assert found.attention_factor == pytest.approx(factor, rel=1e-12), rope
        longest = {"dynamic": config["max_position_embeddings"], "longrope": rope.get("original_max_position_embeddings")}
        assert found.longest_sequence == longest.get(kind)


def test_context_before_scaling_is_looked_for_where_transformers_does() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None}
    for changes, inside in (({}, 77), ({}, None), ({"original_max_position_embeddings": 55}, 77)):
        scaling = {**rope, **({"original_max_position_embeddings": inside} if inside else {})}
        config = {"max_position_embeddings": 440, "head_dim": 24, **changes}
        expected, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**config, rope_parameters=dict(scaling)))
        found = read_rope(Fields({**config, "rope_parameters": scaling}, {}, Path("config.json")))
        torch.testing.assert_close(rotary_inverse_frequencies(found, 24), expected, rtol=2e-6, atol=0)
        assert found.attention_factor == pytest.approx(factor)


def test_a_part_of_a_head_may_be_turned_in_either_spelling() -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 300}
    outside = {**heads, "partial_rotary_factor": 0.75, "rope_theta": 1e4}
    inside = {**heads, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    read = [read_partial_rope(Fields(config, {}, Path("config.json"))) for config in (outside, inside)]
    assert read[0] == read[1]
    assert read[0]["rotary_channels"] == 18
    assert "rotary_channels" not in read_partial_rope(Fields({**heads, "rope_theta": 1e4}, {}, Path("config.json")))
    for factor in (0.65, 1.5, 0.01):
        with pytest.raises(ConversionError, match=r"config\.json: partial_rotary_factor is .* of 24 channels"):
            read_partial_rope(Fields({**outside, "partial_rotary_factor": factor}, {}, Path("config.json")))


def test_scores_of_latent_attention_grow_as_in_transformers() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    rope = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}
    for changes in ({}, {"mscale_all_dim": 0}, {"factor": 1.0}):
        found = latent_score_factor(Fields({"rope_parameters": {**rope, **changes}}, {}, Path("config.json")))
        assert found == pytest.approx(yarn_apply_mscale({**rope, **changes}, 1.0))
    assert latent_score_factor(Fields({"rope_theta": 1e4}, {}, Path("config.json"))) == 1.0


def test_angles_of_a_layers_rope_have_no_gaps() -> None:
    """A fused kernel reads them as one piece of memory, whichever of the model's ropes they are of."""
    arch = ModelArchitecture("gemma3", 2, 48, 88, 4, 2, 12, 83, 256, (Rope(1e4), Rope(1e2, LinearScaling(4.0))), 1e-5)
    positions = torch.tensor([0, 1, 2, 1, 2, 5])
    angles = PackedRotary(arch)(positions)
    assert angles.shape == (2, 6, 1, 1, 12)
    for own, rope in zip(angles, arch.ropes, strict=True):
        assert own.is_contiguous()
        expected = torch.outer(positions.float(), rotary_inverse_frequencies(rope, 12))
        assert torch.equal(own[:, 0, 0], torch.cat([expected, expected], dim=-1))
