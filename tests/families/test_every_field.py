"""Every field of every family's config in transformers: read, refused, or without a say in what is computed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from tests.checkpoint.models import KINDS, write_hf_model

TEXT = torch.randint(203, (1, 24), generator=torch.Generator().manual_seed(3))
# Whether embeddings are tied is a field of all kinds alike.
DISTINCT_KINDS = tuple(kind for kind in KINDS if not kind.endswith("tied"))
# They say which config it is.
IDENTITY = {"architectures", "model_type", "transformers_version", "dtype"}


def others(value: Any) -> list[Any]:
    """What might stand in a field instead."""
    match value:
        case None:
            return [True, 1, 3, 0.05, [0, 1]]
        case bool():
            return [not value, None]
        case int():
            return [value + 1, 2 * value, 1, 0, None]
        case float():
            return [2 * value, value / 2, 0.0, None]
        case str():
            return ["gelu", "relu", "silu", None]
        case list():
            return [value[::-1], value[1:] + value[:1], None]
        case dict():
            return [None, *({**value, name: other} for name, inner in value.items() for other in others(inner))]
    return []


def written(directory: Path, kind: str) -> dict[str, Any]:
    """The config of a model of ``kind``, every field of its class among them."""
    write_hf_model(directory, kind)
    fields = {**AutoConfig.from_pretrained(directory).to_dict(), **json.loads((directory / "config.json").read_text())}
    return {name: value for name, value in json.loads(json.dumps(fields)).items() if name != "dtype"}


def architecture(directory: Path, config: dict[str, Any]) -> ModelArchitecture | None:
    """As it is read; None where it is refused."""
    (directory / "config.json").write_text(json.dumps(config))
    try:
        return read_architecture(directory)
    except ConversionError:
        return None


def model(directory: Path) -> PreTrainedModel | None:
    """What transformers makes of the config; None where it makes nothing, or something as large as its defaults."""
    try:
        config = AutoConfig.from_pretrained(directory)
        small = config.vocab_size < 2000 and config.hidden_size < 200
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() if small else None
    except Exception:
        return None


def logits(model: PreTrainedModel) -> Tensor | None:
    """Logits of the text; None where transformers cannot compute them."""
    try:
        with torch.no_grad():
            found: Tensor = model(TEXT, return_dict=True).logits
            return found
    except Exception:
        return None


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


@functools.cache
def fields_of_all() -> dict[str, Any]:
    """Fields that some family has, with a value each."""
    configs = [AutoConfig.for_model(family) for family in ("qwen2", "gemma3_text", "gpt_oss", "phi3", "granite", "qwen2_moe")]
    found = {name: value for config in configs for name, value in config.to_dict().items() if value}
    return {**json.loads(json.dumps(found)), "clip_qkv": 0.1, "use_sliding_window": True, "sliding_window": 5}


def changes(config: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """Fields and other values: the config's own, and those that other families have."""
    # The fields of all of transformers' configs say the same in each.
    everywhere = PreTrainedConfig().to_dict().keys() if kind != DISTINCT_KINDS[0] else set()
    for name in config.keys() - IDENTITY - everywhere:
        for value in others(config[name]):
            yield name, value
    for name in fields_of_all().keys() - config.keys() - IDENTITY:
        yield name, fields_of_all()[name]


@pytest.mark.parametrize("kind", DISTINCT_KINDS)
def test_what_changes_logits_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    config = written(tmp_path, kind)
    read = architecture(tmp_path, config)
    plain = model(tmp_path)
    assert read is not None
    assert plain is not None
    weights, expected = plain.state_dict(), logits(plain)
    assert expected is not None
    silent = {}
    for name, value in changes(config, kind):
        if architecture(tmp_path, {**config, name: value}) != read or (changed := model(tmp_path)) is None:
            continue
        if shapes(changed.state_dict()) != shapes(weights):
            silent[name] = f"{value!r} has other weights"
            continue
        changed.load_state_dict(weights)
        found = logits(changed)
        if found is not None and not torch.equal(found, expected):
            silent[name] = f"{value!r} has other logits"
    assert silent == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_is_left_out_or_null_is_what_transformers_assumes(kind: str, tmp_path: Path) -> None:
    config = written(tmp_path, kind)
    different = {}
    for name in config.keys() - IDENTITY:
        absent = {field: value for field, value in config.items() if field != name}
        for changed in (absent, {**absent, name: None}):
            read = architecture(tmp_path, changed)
            try:
                filled = AutoConfig.from_pretrained(tmp_path).to_dict()
            except Exception:
                continue
            filled |= {"architectures": config["architectures"], "dtype": None}
            if read is not None and read != architecture(tmp_path, filled):
                different[name] = filled.get(name)
    assert different == {}
