"""Quantized weights: how near they are, what products with them are, on one rank and on two, and what is kept of it."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.layers.latent import WholeLinear
from megatron_rmipo.model.lora.quantized import BLOCK, BYTES_EACH, QuantizedKind, QuantizedWeight, frozen_weight, quantize_linear
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, of the extra quantize"
)
KINDS: tuple[QuantizedKind, ...] = ("nf4", "int8")
T, ROWS, COLUMNS = 6, 10, 384
# Of the largest number of a result.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_nearest_of_255_even_levels(dtype: torch.dtype) -> None:
    weight = made(7, 3 * BLOCK).to(dtype)
    quantized = QuantizedWeight(weight, "int8")
    blocks, found = weight.double().view(-1, BLOCK), quantized.dequantized(torch.float32).double().view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    assert torch.equal(quantized.scales.double(), largest[:, 0])
    levels = found / largest * 127
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=2e-5)
    assert float(((found - blocks) / largest).abs().max()) < 0.505 / 127
    assert quantized.dequantized().dtype == dtype


@needs_bitsandbytes
def test_nf4_is_the_nearest_of_sixteen_quantiles() -> None:
    # Blocks that reach -1 and 1 at their ends, and go evenly through all between.
    weight = torch.linspace(-1, 1, 4 * BLOCK).view(4, BLOCK)
    weight[:, 0], weight[:, -1] = -1, 1
    found = QuantizedWeight(weight, "nf4").dequantized()
    levels = found.unique()
    assert len(levels) == 16
    assert {-1.0, 0.0, 1.0} <= set(levels.tolist())
    # The middle of a normal distribution: odd numbers of quantiles a side, so one more of the positive.
    assert int((levels > 0).sum()) == 8
    nearest = levels[(weight[..., None] - levels).abs().argmin(dim=-1)]
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_weight_is_quantized_as_it_is_in_the_whole(kind: QuantizedKind) -> None:
    weight = made(ROWS, COLUMNS).float()
    weight[3] = 0
    whole = QuantizedWeight(weight, kind).dequantized()
    assert torch.equal(whole[3], torch.zeros(COLUMNS))
    for dim in (0, 1):
        parts = [QuantizedWeight(part, kind).dequantized() for part in weight.chunk(2, dim)]
        assert torch.equal(torch.cat(parts, dim), whole)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("int8", 8.5)])
def test_so_many_bits_a_number(kind: QuantizedKind, bits: float) -> None:
    quantized = QuantizedWeight(made(96, COLUMNS).bfloat16(), kind)
    held = sum(buffer.numel() * buffer.element_size() for buffer in quantized.buffers())
    assert held == 96 * COLUMNS * bits / 8 == 96 * COLUMNS * BYTES_EACH[kind]
    assert not list(quantized.parameters())
    assert not quantized.state_dict()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_scales_stay_exact_in_a_model_of_another_dtype(kind: QuantizedKind) -> None:
    quantized = QuantizedWeight(made(ROWS, COLUMNS).float(), kind)
    before = quantized.dequantized()
    assert torch.equal(torch.nn.Sequential(quantized).bfloat16()[0].dequantized(), before)


def layers(tp_size: int, sequence_parallel: bool, dtype: torch.dtype) -> dict[str, Any]:
    """A layer of each class with this rank's part of one weight and one bias."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        perform_initialization=False,
    )
    common: dict[str, Any] = {"config": config, "init_method": None, "bias": True}
    found: dict[str, Any] = {
        "column": ColumnParallelLinear(COLUMNS, ROWS, gather_output=False, **common),
        "row": RowParallelLinear(COLUMNS, ROWS, input_is_parallel=True, skip_bias_add=False, **common),
        "whole": WholeLinear(config, COLUMNS, ROWS),
    }
    rank = torch.distributed.get_rank()
    for name, layer in found.items():
        part = made(ROWS, COLUMNS)
        if name != "whole":
            part = part.chunk(tp_size, dim=0 if name == "column" else 1)[rank]
            bias = made(ROWS, seed=1)
            layer.bias.data.copy_(bias.chunk(tp_size)[rank] if name == "column" else bias)
        layer.weight.data.copy_(part)
        layer.requires_grad_(False)
    return found


Results = dict[str, list[Tensor]]


def all_results(tp_size: int, sequence_parallel: bool) -> dict[tuple[QuantizedKind, torch.dtype], Results]:
    initialize_runtime(tensor_model_parallel_size=tp_size)
    cases = itertools.product(KINDS, TOLERANCES)
    found = {(kind, dtype): results(tp_size, sequence_parallel, dtype, kind) for kind, dtype in cases}
    shutdown_runtime()
    return found


def results(tp_size: int, sequence_parallel: bool, dtype: torch.dtype, kind: QuantizedKind) -> Results:
    """Of each layer this rank's part of output, gradient of the input, and weight."""
    rank, found, saved = torch.distributed.get_rank(), {}, []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for name, layer in layers(tp_size, sequence_parallel, dtype).items():
        quantize_linear(layer, kind)
        x, out_gradient = made(T, 1, COLUMNS, seed=2).to(dtype), made(T, 1, ROWS, seed=3).to(dtype)
        if name == "row":
            x = x.chunk(tp_size, dim=-1)[rank]
        elif sequence_parallel:
            x = x.chunk(tp_size)[rank]
        x = x.clone().requires_grad_(True)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output, _ = layer(x)
        if name == "column":
            out_gradient = out_gradient.chunk(tp_size, dim=-1)[rank]
        elif sequence_parallel:
            out_gradient = out_gradient.chunk(tp_size)[rank]
        output.backward(out_gradient)
        assert x.grad is not None
        found[name] = [output.detach(), x.grad, frozen_weight(layer)]
    # Neither inputs nor dequantized weights wait for the backward pass.
    assert not saved
    return found


@needs_bitsandbytes
@pytest.mark.dist
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_output_and_gradient_are_those_of_the_dequantized_weight(tp_size: int, sequence_parallel: bool) -> None:
    ranks = run_distributed(all_results, tp_size, tp_size, sequence_parallel)
    for kind, dtype in itertools.product(KINDS, TOLERANCES):
        check([rank[kind, dtype] for rank in ranks], sequence_parallel, dtype, kind)


def check(ranks: list[Results], sequence_parallel: bool, dtype: torch.dtype, kind: QuantizedKind) -> None:
    weight = QuantizedWeight(made(ROWS, COLUMNS).to(dtype), kind).dequantized()
    x, out_gradient = (made(T, 1, size, seed=seed).to(dtype).double() for size, seed in ((COLUMNS, 2), (ROWS, 3)))
    product, gradient = x @ weight.double().T, out_gradient @ weight.double()
    biased, tolerance = product + made(ROWS, seed=1).to(dtype).double(), TOLERANCES[dtype]

    def joined(name: str, number: int, dim: int | None) -> Tensor:
        parts = [rank[name][number] for rank in ranks]
        return parts[0] if dim is None else torch.cat(parts, dim)

    tokens = 0 if sequence_parallel else None
    near(joined("column", 0, -1), biased, tolerance)
    near(joined("column", 1, tokens), gradient, tolerance)
    near(joined("row", 0, tokens), biased, tolerance)
    near(joined("row", 1, -1), gradient, tolerance)
    near(joined("whole", 0, tokens), product, tolerance)
    near(joined("whole", 1, tokens), gradient, tolerance)
    assert torch.equal(joined("column", 2, 0), weight)
    assert torch.equal(joined("row", 2, 1), weight)


@needs_bitsandbytes
def test_what_megatron_computes_with_the_dequantized_weight_is_the_same_to_the_bit() -> None:
    initialize_runtime()
    try:
        for kind in KINDS:
            for name, layer in layers(1, False, torch.float32).items():
                quantize_linear(layer, kind)
                dense = layers(1, False, torch.float32)[name]
                dense.weight.data.copy_(frozen_weight(layer))
                x = made(T, 1, COLUMNS, seed=2).float()
                assert torch.equal(layer(x)[0], dense(x)[0])
    finally:
        shutdown_runtime()


@pytest.mark.parametrize("kind", KINDS)
def test_without_bitsandbytes_it_is_named(kind: QuantizedKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(ConfigError, match=rf"--quantize-base {kind} needs bitsandbytes.*megatron_rmipo\[quantize\]"):
        QuantizedWeight(made(2, BLOCK), kind)
