"""PEFT's LoRA adapters of Hugging Face models: which weights they change, and by how much.

A linear layer's weight becomes ``W + s B A``, with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilized adapters; a
tensor that was saved whole stands in the place of the base model's. Source: PEFT's ``adapter_config.json`` and
``adapter_model.safetensors``.

Shape letters: R rows of a weight, C its columns, r the adapter's rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.errors import ConversionError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
# Fields of the config that ask for more than plain LoRA, with the values that do not.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}
# These change the base model's own weights when they begin, and the adapter belongs to the changed ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class LowRankChange:
    """What an adapter adds to a weight ``[R, C]``.

    Attributes:
        a: fp32 ``[r, C]``.
        b: fp32 ``[R, r]``.
        scale: s.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.b.shape[0], self.a.shape[1]

    def of_rows(self, start: int, stop: int, columns: slice = slice(None)) -> Tensor:
        """What is added to rows ``[start, stop)``, fp32, of the selected columns alone."""
        return (self.b[start:stop] @ self.a[:, columns]) * self.scale

    def part(self, start: int, stop: int) -> LowRankChange:
        """What is added to a weight that is made of these rows."""
        return dataclasses.replace(self, b=self.b[start:stop])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's tensors, by the names of the base model's.

    Attributes:
        path: the file of its weights.
        changes: weight -> what is added to it.
        whole: tensor -> its name in the file, which stands in the place of the base model's.
    """

    path: Path
    changes: dict[str, LowRankChange]
    whole: dict[str, str]


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
        ConversionError: it is no plain LoRA of linear layers, or its files are missing or damaged.
    """
    config, path = _read_config(directory), directory / WEIGHTS_NAME
    _refuse_other_kinds(config, directory)
    if not path.is_file():
        raise ConversionError(f"{directory} holds {CONFIG_NAME} and no {WEIGHTS_NAME}. Save the adapter as safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")  # of a layer that the adapter stands around
        if (match := _FACTOR.fullmatch(own)) is not None:
            factors.setdefault(match["module"], {})[match["which"]] = tensor.to(torch.float32)
        elif "lora_" in own:
            raise ConversionError(f"{path}: {name} is no factor of a linear layer's weight, and only those are merged.")
        else:
            whole[own] = name
    changes = {f"{module}.weight": _change(module, pair, config, path) for module, pair in factors.items()}
    return Adapter(path, changes, whole)


def _change(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> LowRankChange:
    if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
        found = ", ".join(f"lora_{which} {list(tensor.shape)}" for which, tensor in sorted(pair.items()))
        raise ConversionError(f"{path}: {module} has {found}; a linear layer's two factors [r, in] and [out, r] are expected.")
    rank, alpha = pair["A"].shape[0], config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return LowRankChange(pair["A"], pair["B"], float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _refuse_other_kinds(config: Mapping[str, Any], directory: Path) -> None:
    path = directory / CONFIG_NAME
    for field, plain in _PLAIN.items():
        if field in config and config[field] not in plain:
            raise ConversionError(
                f"{path}: {field} is {config[field]!r}; only plain LoRA of linear layers is merged. Merge the adapter with PEFT "
                "(merge_and_unload) and save the model."
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ConversionError(f"{path}: lora_alpha is {config.get('lora_alpha')!r}, no number. Save the adapter again.")
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGES_BASE):
        raise ConversionError(
            f"{path}: init_lora_weights is {begun!r}, which changed the base model's weights at its start. Merge the "
            "adapter with PEFT (merge_and_unload) and save the model."
        )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no object. Save or download the adapter again.")
    return config
