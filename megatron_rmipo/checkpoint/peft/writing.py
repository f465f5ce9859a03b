"""Adapters, written as PEFT does it: ``PeftModel.from_pretrained`` loads them beside their base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from megatron_rmipo.checkpoint.whole_directories import check_output_directory, new_directory
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.adapters import AdapterForm


def file_name(form: AdapterForm, name: str, part: str) -> str:
    """What a factor is called in an adapter's file.

    Args:
        form: the adapter.
        name: transformers' name of the module, or of the parameter of all experts of a layer, that has the adapter.
        part: ``lora_A``, ``lora_B`` or ``lora_magnitude_vector``.
    """
    module, parameters = name, form.expert_parameters_of(name.rpartition(".")[0])
    if name in parameters:
        # The first parameter's adapter stands within the others'.
        around = len(parameters) - 1 - parameters.index(name)
        module = name.rpartition(".")[0] + ".base_layer" * around
    return f"{PREFIX}{module}.{part}" + ("" if part == "lora_magnitude_vector" else ".weight")


def write_adapter(
    directory: Path,
    form: AdapterForm,
    factors: Mapping[str, Mapping[str, Tensor]],
    whole: Mapping[str, Tensor],
    *,
    card: str | None = None,
    flag: str = "--save-adapter",
) -> None:
    """Write an adapter, which appears when all of it is there. One process calls it.

    Args:
        directory: missing or empty.
        form: the adapter. It targets what is in ``factors``, and trains no biases.
        factors: module, or parameter of all experts of a layer -> its tensors: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``
            and, with DoRA, ``lora_magnitude_vector`` ``[out]``; of experts as
            :class:`megatron_rmipo.checkpoint.peft.factors.LowRankFactors` has them. Of any dtype, written as fp32.
        whole: tensors that are stored whole, by their names in the model.
        card: the text of its model card; None writes none.
        flag: that names the directory, for messages.

    Raises:
        ConversionError: the directory holds something, or the file system refuses.
    """
    assert form.bias == "none"
    tensors: dict[str, Tensor] = {}
    for name, parts in factors.items():
        is_target = form.targets_parameter(name) or form.targets_parameter(f"{name}.weight") or form.targets(name)
        assert is_target, f"{name} is no target of the form"
        assert set(parts) == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if form.use_dora else set()), (name, set(parts))
        tensors.update({file_name(form, name, part): tensor for part, tensor in parts.items()})
    tensors.update({PREFIX + name: tensor for name, tensor in whole.items()})
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    check_output_directory(directory, flag)
    try:
        with new_directory(directory) as partial:
            save_file(stored, partial / WEIGHTS_NAME, metadata={"format": "pt"})
            config = json.dumps(form.to_config(), indent=2, sort_keys=True)
            (partial / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise ConversionError(
            f"{flag} {directory} cannot be written: {error}. Free some space or name another directory."
        ) from error
