"""Quantizes the frozen linear layers of a model that has its weights and its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.layers.latent import WholeLinear
from megatron_rmipo.model.lora.attach import low_ranks
from megatron_rmipo.model.lora.quantized import (
    BLOCK,
    QuantizedKind,
    QuantizedWeight,
    bitsandbytes_functional,
    frozen_weight,
    quantize_linear,
)
from megatron_rmipo.model.named_tensors import ADAPTER, REFERENCE_ADAPTER
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped

_LINEARS = (ColumnParallelLinear, RowParallelLinear, WholeLinear)


def quantize_base(model: Chunks, kind: QuantizedKind) -> None:
    """Keep the frozen weights of the decoder's linear layers, experts' among them, in 4 or 8 bits. All ranks call it together.

    Embedding, output layer, norms, routers and what is trained whole stay as they are. A layer keeps its class, name and forward;
    its ``weight`` is a :class:`QuantizedWeight`. Layers are done one after the other, and the weight of each is given up at once.
    Called after adapters are added, which freezes weights, and before adapters are read from files and DDP is built: the lengths
    that DoRA trains become those of the quantized rows, so that a new adapter still changes nothing.

    Args:
        model: this rank's part with its weights, or its chunks.
        kind: ``nf4`` or ``int8``.

    Raises:
        ConfigError: bitsandbytes is missing or has nothing for the device, a row is not of whole blocks, or layers are of a class
            that takes no quantized weights. The model is as it was then.
    """
    decoders = [unwrapped(chunk).decoder for chunk in chunks_of(model)]
    for parameters in map(list, (decoder.parameters() for decoder in decoders)):
        assert not parameters or not all(one.requires_grad for one in parameters), "adapters, which freeze weights, come first"
    layers = [one for decoder in decoders for one in _frozen_linears(decoder, kind)]
    for name, layer in layers:
        num_columns = frozen_weight(layer).shape[1]
        if num_columns % BLOCK:
            raise ConfigError(
                f"--quantize-base {kind}: rows of {name} are {num_columns} numbers on a rank, which are no whole blocks of "
                f"{BLOCK}; choose a --tensor-model-parallel-size that cuts them at blocks, or leave the flag out."
            )
    for device in {frozen_weight(layer).device for _, layer in layers}:
        _try_on(device, kind)
    for _, layer in layers:
        quantize_linear(layer, kind)
    for name in (ADAPTER, REFERENCE_ADAPTER):
        for _, layer, adapter in low_ranks(model, name):
            if adapter.has_lengths and isinstance(layer.weight, QuantizedWeight):
                adapter.set_lengths(adapter.row_lengths(frozen_weight(layer)))


def _frozen_linears(decoder: Module, kind: QuantizedKind) -> Iterator[tuple[str, Module]]:
    """Linear layers whose weight is a parameter that is not trained, with their names."""
    for name, module in decoder.named_modules():
        frozen = [one for one in module.parameters(recurse=False) if one.dim() == 2 and not one.requires_grad]
        if isinstance(module, _LINEARS):
            if frozen:
                yield name, module
        elif frozen and type(module).__name__.startswith("TE"):
            raise ConfigError(
                f"--quantize-base {kind}: {name} is Transformer Engine's {type(module).__name__}, which multiplies with no "
                "quantized weights; give --transformer-impl local, and no --moe-grouped-gemm."
            )


def _try_on(device: torch.device, kind: QuantizedKind) -> None:
    """Quantize a block of zeros on a device and back.

    Raises:
        ConfigError: bitsandbytes has no kernels for it.
    """
    functional: Any = bitsandbytes_functional(kind)
    zeros: Tensor = torch.zeros(1, BLOCK, device=device)
    try:
        QuantizedWeight(zeros, kind).dequantized()
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"--quantize-base {kind}: bitsandbytes cannot quantize on {device.type} here ({str(error).splitlines()[0]}). Look at "
            f"python -m {functional.__name__.partition('.')[0]}, or leave the flag out."
        ) from error
