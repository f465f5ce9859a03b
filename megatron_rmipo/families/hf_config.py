"""From a Hugging Face ``config.json`` to a :class:`ModelArchitecture`, by what its family says.

Whatever the config asks of the model beyond what is built is refused by field: a model that differs silently is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture, RopeScaling
from megatron_rmipo.families.base import Family
from megatron_rmipo.families.harmless_fields import HARMLESS_FIELDS
from megatron_rmipo.families.registry import FAMILIES

_ROPE_TYPES = ("default", "llama3")
# Read as they are, beside those of _Fields.
_OTHER_FIELDS = ("architectures", "rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype")
_DTYPES = ("float32", "float16", "bfloat16")


def read_architecture(hf_dir: Path) -> ModelArchitecture:
    """Read ``config.json`` of a Hugging Face model directory.

    Args:
        hf_dir: the directory; weights and tokenizer are not looked at.

    Raises:
        ConversionError: no readable config, an unknown architecture, or a field whose value is not supported.
    """
    path = Path(hf_dir) / "config.json"
    config = _read_json(path)
    family = _family_of(config, path)
    for field, allowed in family.only.items():
        found = config.get(field)
        # A list says it layer by layer.
        for value in found if isinstance(found, list) else [found]:
            if field in config and value not in allowed:
                raise ConversionError(
                    f"{path}: {field} is {value!r}, but only {_listed(allowed)} is supported for the {family.name} family."
                )
    fields = _Fields(config, family.defaults, path)
    heads = fields.count("num_attention_heads")
    groups = fields.count("num_key_value_heads") if fields.get("num_key_value_heads") is not None else heads
    hidden_size = fields.count("hidden_size")
    if heads % groups:
        raise ConversionError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}.")
    if fields.get("head_dim") is None and hidden_size % heads:
        raise ConversionError(f"{path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}.")
    rope_base, rope_scaling = _read_rope(config, path)
    traits = dict.fromkeys(family.always, True)
    for switch, names in family.switches.items():
        traits.update(dict.fromkeys(names, fields.flag(switch)))
    architecture = ModelArchitecture(
        family=family.name,
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=fields.count("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=fields.count("head_dim") if fields.get("head_dim") is not None else hidden_size // heads,
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        rotary_base=rope_base,
        layernorm_epsilon=fields.number("rms_norm_eps"),
        tied_embeddings=bool(fields.get("tie_word_embeddings")),
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(fields) if family.has_sliding_window else None,
        dtype=_read_dtype(config, path),
        **traits,
    )
    _refuse_unknown(config, {*family.only, *family.unread, *fields.read}, f"{path}: the {family.name} family")
    return architecture


class _Fields:
    """Typed access to a config, whose errors name file, field and value."""

    def __init__(self, config: dict[str, Any], defaults: Mapping[str, object], path: Path) -> None:
        self._config, self._defaults, self._path = config, defaults, path
        self.read: set[str] = set()

    def get(self, name: str) -> object:
        self.read.add(name)
        return self._config[name] if name in self._config else self._defaults.get(name)

    def count(self, name: str) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"{self._path}: {name} must be a positive integer, found {value!r}.")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConversionError(f"{self._path}: {name} must be true or false, found {value!r}.")
        return bool(value)

    def number(self, name: str) -> float:
        return _positive_number(self.get(name), name, self._path)


def _refuse_unknown(config: dict[str, Any], known: set[str], who: str) -> None:
    """Refuse fields that nobody reads; one that is off (false, null, zero, empty) asks for nothing."""
    unknown = {name: config[name] for name in config.keys() - known - {*_OTHER_FIELDS} - HARMLESS_FIELDS if config[name]}
    if unknown:
        listed = ", ".join(f"{name} (which is {value!r:.60})" for name, value in sorted(unknown.items()))
        raise ConversionError(
            f"{who} knows no {listed}. A model that computes something else is not supported; remove what says nothing about "
            "what is computed."
        )


def _sliding_window(fields: _Fields) -> int | None:
    return fields.count("sliding_window") if fields.get("sliding_window") is not None else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = "is there, but it holds no config.json" if path.parent.is_dir() else "does not exist"
        raise ConversionError(
            f"{path.parent} {where}. Name a Hugging Face model directory (config.json, *.safetensors, tokenizer)."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds a {type(config).__name__}, not a model configuration.")
    return config


def _family_of(config: dict[str, Any], path: Path) -> Family:
    found = config.get("architectures")
    names = found if isinstance(found, list) else []
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in names):
            return family
    shown = f"architectures is {found!r}" if found else "architectures is missing"
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise ConversionError(f"{path}: {shown}. Known architectures: {known}.")


def _read_rope(config: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    # transformers 5 keeps theta and scaling together in rope_parameters; before, rope_theta and rope_scaling stood apart.
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{path}: {field} must be a mapping, found {rope!r}.")
    base = _positive_number(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", path)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ConversionError(f"{path}: {field} asks for rotary scaling {kind!r}; supported are {_listed(_ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found = rope["partial_rotary_factor"]
        raise ConversionError(f"{path}: {field}.partial_rotary_factor is {found!r}; only 1.0 is supported.")
    if kind == "default":
        return base, None

    def number(name: str) -> float:
        return _positive_number(rope.get(name), f"{field}.{name}", path)

    return base, RopeScaling(
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_position_embeddings=int(number("original_max_position_embeddings")),
    )


def _read_dtype(config: dict[str, Any], path: Path) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in _DTYPES:
        raise ConversionError(f"{path}: torch_dtype is {value!r}; supported are {_listed(_DTYPES)}.")
    return str(value)


def _positive_number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConversionError(f"{path}: {name} must be a positive number, found {value!r}.")
    return float(value)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(repr(value) for value in values if value is not None)
