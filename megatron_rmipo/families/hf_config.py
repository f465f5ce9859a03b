"""From a Hugging Face ``config.json`` to a :class:`ModelArchitecture`, by what its family says.

Whatever the config asks of the model beyond what is built is refused by field: a model that differs silently is worse than none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import LongRopeScaling, ModelArchitecture
from megatron_rmipo.families.base import Family
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.harmless_fields import HARMLESS_FIELDS
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.rope import read_rope
from megatron_rmipo.families.unbuilt import UNBUILT

# Read as they are, beside those of Fields; the rotary ones whichever of them a config holds.
_OTHER_FIELDS = (
    *("architectures", "rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"),
    *("dtype", "torch_dtype"),
)
_DTYPES = ("float32", "float16", "bfloat16")


def read_architecture(hf_dir: Path) -> ModelArchitecture:
    """Read ``config.json`` of a Hugging Face model directory.

    Args:
        hf_dir: the directory; weights and tokenizer are not looked at.

    Raises:
        ConversionError: no readable config, an unknown architecture, or a field whose value is not supported.
    """
    path = Path(hf_dir) / "config.json"
    return architecture_of(read_json(path), path)


def architecture_of(config: dict[str, Any], path: Path) -> ModelArchitecture:
    """The model that the fields of a ``config.json`` describe.

    Args:
        config: the fields.
        path: where they stand, for messages.

    Raises:
        ConversionError: as of :func:`read_architecture`.
    """
    family = _family_of(config, path)
    _refuse_quantized(config, path)
    for field, allowed in family.only.items():
        found = config.get(field)
        # A list says it layer by layer.
        for value in found if isinstance(found, list) else [found]:
            if field in config and value not in allowed:
                supported = _listed(allowed)
                raise ConversionError(
                    f"{path}: {field} is {value!r}, but "
                    f"{f'only {supported} is supported for' if supported else 'no value of it is built for'} "
                    f"the {family.name} family."
                )
    fields = Fields(config, family.defaults, path)
    heads = fields.count("num_attention_heads")
    groups = fields.count("num_key_value_heads") if fields.get("num_key_value_heads") is not None else heads
    hidden_size = fields.count("hidden_size")
    if heads % groups:
        raise ConversionError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}.")
    if fields.get("head_dim") is None and hidden_size % heads:
        raise ConversionError(f"{path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}.")
    traits: dict[str, Any] = {
        "num_layers": fields.count("num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": fields.count("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": fields.count("head_dim") if fields.get("head_dim") is not None else hidden_size // heads,
        "vocab_size": fields.count("vocab_size"),
        "max_position_embeddings": fields.count("max_position_embeddings"),
        "layernorm_epsilon": fields.number("rms_norm_eps"),
        "tied_embeddings": bool(fields.get("tie_word_embeddings")),
        "dtype": _read_dtype(config, path),
        **dict.fromkeys(family.always, True),
    }
    for switch, names in family.switches.items():
        traits.update(dict.fromkeys(names, fields.flag(switch)))
    if family.read is not None:
        traits.update(family.read(fields))
    if "ropes" not in traits:
        traits["ropes"] = (read_rope(fields),)
    architecture = ModelArchitecture(family=family.name, **traits)
    _check_long_ropes(architecture, path)
    _refuse_unknown(fields, {*family.only, *family.unread}, f"{path}: the {family.name} family")
    return architecture


def _refuse_quantized(config: dict[str, Any], path: Path) -> None:
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        asked = "quantization_config=Mxfp4Config(dequantize=True)" if method == "mxfp4" else "dequantized"
        raise ConversionError(
            f"{path}: quantization_config says that the weights are quantized ({method!r}). Load the model with transformers in "
            f"bfloat16 (AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16, {asked}), save it with save_pretrained, and "
            "name that directory."
        )


def _check_long_ropes(arch: ModelArchitecture, path: Path) -> None:
    """Factors of single frequencies are as many as there are frequencies."""
    for rope in arch.ropes:
        if isinstance(rope.scaling, LongRopeScaling) and len(rope.scaling.short_factors) != arch.turned_channels // 2:
            raise ConversionError(
                f"{path}: short_factor has {len(rope.scaling.short_factors)} numbers, but rotary embeddings turn "
                f"{arch.turned_channels // 2} pairs of channels."
            )


def _refuse_unknown(fields: Fields, known: set[str], who: str) -> None:
    """Refuse fields that nobody reads."""
    unknown = fields.unread({*known, *_OTHER_FIELDS} | HARMLESS_FIELDS)
    if unknown:
        listed = ", ".join(f"{name} (which is {value!r:.60})" for name, value in sorted(unknown.items()))
        raise ConversionError(
            f"{who} knows no {listed}. A model that computes something else is not supported; remove what says nothing about "
            "what is computed."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a ``config.json``.

    Raises:
        ConversionError: it is not there, or no such file.
    """
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
    unbuilt = next((name for name in names if name in UNBUILT), None)
    if unbuilt is not None:
        raise ConversionError(f"{path}: {unbuilt} is not supported: {UNBUILT[unbuilt]}.")
    shown = f"architectures is {found!r}" if found else "architectures is missing"
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise ConversionError(
        f"{path}: {shown}. Known architectures: {known}. Where NVIDIA's Megatron-Bridge is installed, training and scoring take "
        "others with --bridge megatron-bridge; the converters do not."
    )


def _read_dtype(config: dict[str, Any], path: Path) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in _DTYPES:
        raise ConversionError(f"{path}: torch_dtype is {value!r}; supported are {_listed(_DTYPES)}.")
    return str(value)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(repr(value) for value in values if value is not None)
