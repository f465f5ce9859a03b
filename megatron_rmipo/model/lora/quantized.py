"""Frozen weights of Megatron's linear layers in 4 or 8 bits, and products with them.

A row of a weight is cut into blocks of 64 numbers, of each of which its largest magnitude is kept, and of each number the nearest
of a few levels between that and its negative: ``nf4`` has sixteen, at quantiles of a normal distribution (QLoRA,
arXiv:2305.14314, section 3), ``int8`` has 255, evenly spaced. Packing and kernels are bitsandbytes'. Blocks lie within rows, and
nothing is taken over several of them, so that ranks which hold parts of a weight have what a rank with all of it has.

Shape letters: T tokens of the row, R rows of this rank's part of a weight, C its columns.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.packed_model import Replacement

BLOCK = 64
QuantizedKind = Literal["nf4", "int8"]
# Of a number, with its share of its block's fp32 scale.
BYTES_EACH: dict[QuantizedKind, float] = {"nf4": 0.5 + 4 / BLOCK, "int8": 1 + 4 / BLOCK}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuantizedWeight(Module):
    """Stands as ``weight`` of a linear layer where a parameter was; checkpoints have nothing of it.

    Args:
        weight: ``[R, C]``, C a multiple of 64, of a floating-point dtype.
        kind: ``nf4`` or ``int8``.

    Attributes:
        kind: as given.
        shape: R and C.
        dtype: of the weight as it was.
        codes: uint8, ``[R * C / 2, 1]`` for nf4, which packs two numbers in a byte, ``[R, C]`` for int8.
        scales: fp32 ``[R * C / 64]``, the blocks' largest magnitudes.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, kind: QuantizedKind) -> None:
        super().__init__()
        assert weight.shape[1] % BLOCK == 0, weight.shape
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        codes, scales = _quantized(weight.detach().to(_nearest(weight.dtype)).contiguous(), kind)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """``[R, C]``, new; in the dtype that the weight had, or another."""
        dtype = dtype or self.dtype
        functional, nearest = bitsandbytes_functional(self.kind), _nearest(dtype)
        state = functional.QuantState(self.scales, shape=self.shape, dtype=nearest, blocksize=BLOCK)
        if self.kind == "nf4":
            state.quant_type = "nf4"
            weight: Tensor = functional.dequantize_4bit(self.codes, state)
        else:
            state.code = _even_levels(self.codes.device)
            weight = functional.dequantize_blockwise(self.codes, state)
        return weight.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # Scales move with the model, but stay fp32 where it is made one of bf16.
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = exact.to(self.codes.device)
        return self


class QuantizedProduct(Replacement):
    """What a linear layer computes once the tokens are there: their product with its quantized weight.

    It stands behind the layer's forward, which is as it was, and whose sums and gathers around the product are Megatron's.

    Args:
        layer: Megatron's, or one with its ``_forward_impl``; its weight is a :class:`QuantizedWeight`.
    """

    outlives_attach = True

    def __init__(self, layer: Module) -> None:
        super().__init__(layer, "_forward_impl")

    def __call__(
        self,
        input: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **_of_weight_gradients: Any,
    ) -> Tensor:
        """As Megatron's ``linear_with_frozen_weight``: ``[T, .., R]`` of ``[T, .., C]``, T / tp under sequence parallelism.

        Args:
            input: any floating-point dtype, which is that of the product.
            weight: the layer's.
            bias: ``[R]``, or None.
            allreduce_dgrad: the gradient of the input is summed over the group.
            sequence_parallel: tokens are gathered from the group before, and gradients summed and scattered.
            tp_group: whose ranks call it together where one of these is said.
        """
        whole: Tensor = input
        if sequence_parallel:
            whole = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            whole = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output: Tensor = _Product.apply(whole, weight)  # type: ignore[no-untyped-call]
        return output if bias is None else output + bias


def quantize_linear(layer: Module, kind: QuantizedKind) -> None:
    """Have a linear layer keep its weight in 4 or 8 bits, and give up the parameter.

    Args:
        layer: as of :class:`QuantizedProduct`; the columns of its weight are a multiple of 64.
        kind: ``nf4`` or ``int8``.
    """
    weight = QuantizedWeight(frozen_weight(layer), kind)
    del layer.weight
    layer.weight = weight
    QuantizedProduct(layer)


def frozen_weight(layer: Module) -> Tensor:
    """``[R, C]``: the weight of a linear layer, without gradient: itself, or a new tensor where it is quantized."""
    weight: Any = layer.weight
    return weight.dequantized() if isinstance(weight, QuantizedWeight) else weight.detach()


def bitsandbytes_functional(kind: QuantizedKind) -> Any:
    """The functions of bitsandbytes, imported when they are first needed.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # its libraries are built for versions of CUDA, and fail in ways of their own
        raise ConfigError(
            f"--quantize-base {kind} needs bitsandbytes, which cannot be imported ({error}). "
            "pip install 'megatron_rmipo[quantize]', or leave the flag out."
        ) from error


class _Product(torch.autograd.Function):
    """``input @ weight.T``, that keeps for the backward pass neither the input nor the dequantized weight, which is made anew."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: QuantizedWeight) -> Tensor:
        """``[.., R]`` of ``[.., C]``."""
        # Not among saved tensors, which activation offloading would send away.
        ctx.weight = weight
        return input @ weight.dequantized(input.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """``[.., C]`` of ``[.., R]``."""
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantized(gradient.dtype), None


def _quantized(weight: Tensor, kind: QuantizedKind) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    functional = bitsandbytes_functional(kind)
    if kind == "nf4":
        # Scales quantized in turn would be taken less the mean of all that a rank holds, which is another at another layout.
        codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    else:
        codes, state = functional.quantize_blockwise(weight, code=_even_levels(weight.device), blocksize=BLOCK)
    return codes, state.absmax


@functools.cache
def _even_levels(device: torch.device) -> Tensor:
    """fp32 ``[256]``: -127 to 127, the lowest twice, over 127."""
    return torch.arange(-128, 128, device=device).clamp(min=-127) / 127


def _nearest(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself where bitsandbytes takes it, else fp32."""
    return dtype if dtype in _DTYPES else torch.float32
