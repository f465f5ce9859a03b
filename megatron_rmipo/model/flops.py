"""Model floating point operations, as the cost model that batches are cut by, and what devices can do.

Counted are the multiplications and additions of matrix products that the loss needs: layers for each token that stands in the
packed row, attention for each (query, key) that is kept, the output layer for each scored token. A backward is twice the forward:
as much for the gradient of a weight, and for that of its input; beside an adapter frozen weights have no gradient. What an
adapter's own products take counts as any matrix. Of experts those count that a token goes through.
Recomputation (of activations, or of logits in the chunked head) is not counted: it is work done, not work needed. Norms, biases,
rotary embeddings, softmax and the optimizer are left out as usual. Layers with a sliding window keep the scores within it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import torch

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.data.batches.sizes import Backward, CostModel
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.targets import is_linear, modules_to_save
from megatron_rmipo.families.tensors import megatron_shape
from megatron_rmipo.model.lora.numbers import active_adapter_numbers

# Dense peak FLOP/s by part of torch's device name: (bf16 tensor cores, fp32 without tensor cores), from the data sheets.
_PEAK_FLOPS: dict[str, tuple[float, float]] = {
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "L4": (121e12, 30.3e12),
    "L40S": (362e12, 91.6e12),
    "H20": (148e12, 44e12),
    "H100": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H800": (989.4e12, 66.9e12),
    "H800 PCIe": (756e12, 51e12),
    "H200": (989.4e12, 66.9e12),
    "H200 NVL": (835e12, 60e12),
    "GH200": (989.4e12, 66.9e12),
    "B200": (2250e12, 75e12),
    "MI300X": (1307.4e12, 163.4e12),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device at best, dense.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it.
        dtype: what is computed in: bfloat16, float16 or float32.

    Returns:
        None where the device or the dtype is not known.
    """
    device = known_device(device_name)
    if device is None:
        return None
    low_precision, single_precision = _PEAK_FLOPS[device]
    return {torch.bfloat16: low_precision, torch.float16: low_precision, torch.float32: single_precision}.get(dtype)


def known_device(device_name: str) -> str | None:
    """The device that ``torch.cuda.get_device_name()`` names, as the table of peaks has it: whole words, the most of them."""
    words = device_name.replace("-", " ").split()
    return max((name for name in _PEAK_FLOPS if _contains(words, name.split())), key=len, default=None)


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def forward_cost_model(arch: ModelArchitecture, lora: LoraConfig | None = None) -> CostModel:
    """Forward FLOPs (a multiply-add counts two): layers per token, attention per kept score, output layer per scored token.

    Of a model of no family here they are estimated: all its layers have the same matrices, and see everything.

    Args:
        arch: the model.
        lora: the flags of the adapter; None, or off, where all weights are trained.
    """
    per_area = 2.0 * (arch.query_size + arch.context_size)
    per_scored_token = 2.0 * arch.hidden_size * arch.vocab_size
    if isinstance(arch, ForeignArchitecture):
        per_token = 2.0 * arch.num_layers * arch.layer_matrices
        return CostModel(per_token=per_token, per_area=per_area * arch.num_layers, per_scored_token=per_scored_token)
    mlps = len(arch.dense_layers) * 3 * arch.hidden_size * arch.ffn_hidden_size
    if arch.experts is not None:
        experts = arch.experts
        channels = experts.per_token * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
        router = experts.num_experts + experts.shared_gate
        mlps += len(arch.expert_layers) * arch.hidden_size * (3 * channels + router)
    windows = Counter(arch.kind_of(layer).window for layer in range(arch.num_layers))
    plain = CostModel(
        per_token=2.0 * (arch.num_layers * _projections(arch) + mlps),
        per_area=per_area * windows.pop(None, 0),
        per_windowed_area=tuple((window, per_area * layers) for window, layers in windows.items() if window is not None),
        per_scored_token=per_scored_token,
    )
    return plain if lora is None or not lora.is_on else _with_adapter(plain, arch, lora)


def _with_adapter(plain: CostModel, arch: ModelArchitecture, lora: LoraConfig) -> CostModel:
    """A model whose weights are frozen, but for an adapter and the modules that are trained whole beside it."""
    numbers = active_adapter_numbers(arch, lora)
    head = FAMILIES[arch.family].head
    whole = {rule.megatron for rule, _ in modules_to_save(arch, lora)}
    trained = sum(math.prod(megatron_shape(rule, arch)) for rule, _ in modules_to_save(arch, lora) if is_linear(rule, arch))
    per_token = plain.per_token + 2.0 * numbers
    # Of frozen matrices the gradient of their input alone.
    backward = Backward(tokens=(plain.per_token + 2.0 * (trained + 2 * numbers)) / per_token, scored_tokens=1.0 + (head in whole))
    return dataclasses.replace(plain, per_token=per_token, backward=backward)


def _projections(arch: ModelArchitecture) -> int:
    """Multiply-adds of a token in the matrices of one layer's attention."""
    outputs, latent = arch.hidden_size * arch.context_size, arch.latent
    if latent is None:
        return outputs + arch.hidden_size * (arch.query_size + 2 * arch.key_size)
    queries = arch.hidden_size * arch.query_size
    if latent.q_lora_rank is not None:
        queries = latent.q_lora_rank * (arch.hidden_size + arch.query_size)
    keys_and_values = arch.hidden_size * latent.key_value_down_size + latent.kv_lora_rank * arch.key_value_up_size
    return outputs + queries + keys_and_values
