"""Frequencies of rotary embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture, RopeScaling


def rotary_inverse_frequencies(arch: ModelArchitecture) -> Tensor:
    """fp32 ``[kv_channels / 2]`` inverse frequencies of rotary embeddings, with ``llama3`` scaling where the model has it.

    Source: the ``llama3`` rope type of Hugging Face configs: wavelengths beyond the original context over
    ``low_freq_factor`` are slowed by ``factor``, those under it over ``high_freq_factor`` kept, the band between blended.
    """
    exponents = torch.arange(0, arch.kv_channels, 2, dtype=torch.int64).to(torch.float32) / arch.kv_channels
    frequencies = 1.0 / (arch.rotary_base**exponents)
    scaling = arch.rope_scaling
    return frequencies if scaling is None else _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    blend = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = wavelengths > context / scaling.low_freq_factor
    fast = wavelengths < context / scaling.high_freq_factor
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))
