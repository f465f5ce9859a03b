"""PEFT's LoRA adapters of Hugging Face models, read: which weights they change, and by how much.

A linear layer's weight becomes ``W + s B A``, with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilized adapters, and
with DoRA its rows are given lengths besides; a tensor that was saved whole stands in the place of the base model's. Source:
PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.peft.factors import LowRankFactors
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.adapters import EXPERT_PARAMETERS, AdapterForm

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# Of a model's or an adapter's card, as the hub knows it.
CARD_NAME = "README.md"
# What the names in an adapter's file begin with.
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<which>A\.weight|B\.weight|magnitude_vector)")
_PARTS = {"A.weight": "lora_A", "B.weight": "lora_B", "magnitude_vector": "lora_magnitude_vector"}
_MERGE_WITH_PEFT = "Merge the adapter with PEFT (merge_and_unload) and save the model."
# Fields of the config that ask for more than LoRA of linear layers and experts, with the values that do not.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
# These change the base model's own weights when they begin, and the adapter belongs to the changed ones; or another rounding.
_OTHER_BEGINNINGS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter, by transformers' names of the base model's modules and parameters.

    Attributes:
        path: the file of its weights.
        form: what its config says.
        factors: module, or parameter of all experts of a layer -> what is added to its weight. Adapters that were trained where
            every expert was a module have those modules' names, ``model.layers.0.mlp.experts.3.gate_proj``.
        whole: tensor of the model -> its name in the file, which stands in the place of the base model's.
    """

    path: Path
    form: AdapterForm
    factors: dict[str, LowRankFactors]
    whole: dict[str, str]

    def read_whole(self) -> dict[str, Tensor]:
        """The tensors that were saved whole, by their names in the model, of the file's dtype.

        Raises:
            ConversionError: the file cannot be read.
        """
        tensors = _load(self.path) if self.whole else {}
        return {name: tensors[saved] for name, saved in self.whole.items()}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / CONFIG_NAME).is_file() and not (directory / "config.json").is_file()


def refuse_idle_base(base: str | Path | None, *directories: str | Path | None) -> None:
    """Refuse ``--base-hf`` where no directory holds an adapter.

    Raises:
        ConversionError: naming them.
    """
    given = [Path(directory) for directory in directories if directory is not None]
    if base is not None and not any(map(is_adapter, given)):
        named = " and ".join(map(str, given)) or "no --load-hf"
        raise ConversionError(f"--base-hf {base} does nothing: {named} holds no adapter ({CONFIG_NAME}). Leave it out.")


def model_directory(directory: Path, base: Path | None = None) -> Path:
    """The directory of a model's config, tokenizer and own weights: of an adapter that of its base model.

    Args:
        directory: of a model or of an adapter.
        base: what was given as the base model of adapters; None: the directory that the adapter names.

    Raises:
        ConversionError: the adapter's base model is no directory here.
    """
    directory = Path(directory)
    if not is_adapter(directory):
        return directory
    named = _read_config(directory).get("base_model_name_or_path")
    found = base if base is not None else Path(str(named or ""))
    if not (found / "config.json").is_file():
        said = f"--base-hf {base}" if base is not None else f"its {CONFIG_NAME} names {named!r}, which"
        raise ConversionError(
            f"{directory} holds an adapter, and {said} is no directory of a model. Name that of its base model with "
            "--base-hf DIR; nothing is downloaded."
        )
    return found


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter.

    Raises:
        ConversionError: it is no LoRA of linear layers and experts, or its files are missing or damaged.
    """
    config, path = _read_config(directory), directory / WEIGHTS_NAME
    form = _read_form(config, directory)
    if not path.is_file():
        raise ConversionError(f"{directory} holds {CONFIG_NAME} and no {WEIGHTS_NAME}. Save the adapter as safetensors.")
    # Module -> how many others stand around it -> parts by name.
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    whole: dict[str, str] = {}
    for name, tensor in _load(path).items():
        own = name.removeprefix(PREFIX)
        if (match := _FACTOR.fullmatch(own)) is not None:
            depths = found.setdefault(match["module"], {})
            depths.setdefault(match["inner"].count("."), {})[_PARTS[match["which"]]] = tensor.to(torch.float32)
        elif "lora_" in own:
            raise ConversionError(f"{path}: {name} is no factor of a weight, and only those are merged. {_MERGE_WITH_PEFT}")
        else:
            whole[own.replace(".base_layer.", ".")] = name  # of a layer that the adapter stands around
    factors: dict[str, LowRankFactors] = {}
    for module, depths in found.items():
        for name, parts in zip(_names_of(module, depths, form, path), map(depths.get, sorted(depths, reverse=True)), strict=True):
            assert parts is not None
            factors[name] = _factors_of(name, parts, form, path, of_experts=name != module, is_early=_is_early(config))
    return Adapter(path, form, factors, whole)


def dropout_of(directory: Path) -> float:
    """The dropout that an adapter was trained with.

    Raises:
        ConversionError: its config cannot be read.
    """
    share = _read_config(directory).get("lora_dropout")
    return float(share) if isinstance(share, int | float) else 0.0


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error


def _names_of(module: str, depths: Mapping[int, object], form: AdapterForm, path: Path) -> tuple[str, ...]:
    """What is adapted at a module: itself, or parameters of experts, of which the first stands within the others."""
    parameters = form.expert_parameters_of(module)
    names = parameters or (module,)
    if sorted(depths) != list(range(len(names))):
        raise ConversionError(
            f"{path}: {module} has {len(depths)} pairs of factors, and target_parameters in {CONFIG_NAME} names "
            f"{len(parameters)} of its parameters {' and '.join(EXPERT_PARAMETERS)}. Save the adapter again."
        )
    return names


def _factors_of(
    name: str, parts: Mapping[str, Tensor], form: AdapterForm, path: Path, *, of_experts: bool, is_early: bool
) -> LowRankFactors:
    a, b, magnitude = parts.get("lora_A"), parts.get("lora_B"), parts.get("lora_magnitude_vector")
    fit = a is not None and b is not None and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
    if a is None or b is None or not fit or (magnitude is None) == form.use_dora or not _is_length(magnitude, b):
        found = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))
        expected = "two factors [r, in] and [out, r]" + (" and lora_magnitude_vector [out]" if form.use_dora else "")
        raise ConversionError(f"{path}: {name} has {found}; {expected} of its weight are expected. Save the adapter again.")
    of_weight = form.targets_parameter(f"{name}.weight")
    num_experts, rank = None, a.shape[0]
    if of_experts:
        rank = form.rank_of(name)
        if a.shape[0] % rank:
            raise ConversionError(
                f"{path}: {name} has lora_A {list(a.shape)}, which is no multiple of the rank {rank} that {CONFIG_NAME} says. "
                "Save the adapter again."
            )
        num_experts = a.shape[0] // rank
        if a.shape[1] == b.shape[0] and is_early:
            raise ConversionError(
                f"{path}: PEFT before 0.19.1 wrote the factors of experts the other way round, which those of {name}, whose "
                "weights are square, do not tell. Merge it with that version (merge_and_unload) and save the model."
            )
    alpha, scale = form.alpha_of(name), form.scale_of(name, rank)
    return LowRankFactors(a, b, rank, alpha, scale, magnitude, num_experts, is_rounded=of_weight or of_experts)


def _is_early(config: Mapping[str, Any]) -> bool:
    """Whether the adapter says that a version of PEFT wrote it that had the factors of experts otherwise."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version")))
    return version is not None and tuple(map(int, version.groups())) < (0, 19, 1)


def _is_length(magnitude: Tensor | None, b: Tensor) -> bool:
    return magnitude is None or magnitude.shape == b.shape[:1]


def _read_form(config: Mapping[str, Any], directory: Path) -> AdapterForm:
    path = directory / CONFIG_NAME
    for field, plain in _PLAIN.items():
        if field in config and config[field] not in plain:
            raise ConversionError(
                f"{path}: {field} is {config[field]!r}; only LoRA of linear layers and experts is read. {_MERGE_WITH_PEFT}"
            )
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_OTHER_BEGINNINGS):
        raise ConversionError(
            f"{path}: init_lora_weights is {begun!r}, which changed the base model's weights at its start, or is merged in "
            f"another way. {_MERGE_WITH_PEFT}"
        )
    try:
        return AdapterForm.from_config(config)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{path}: {error}. Save the adapter again.") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no object. Save or download the adapter again.")
    return config
