"""Rotary embeddings of packed rows: the angles of each token's own position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rmipo.families.architecture import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelArchitecture,
    Rope,
    YarnScaling,
)


class PackedRotary(torch.nn.Module):
    """Stands as a model's ``rotary_pos_emb``: gives the angles of positions, which restart where a prompt ended.

    Shape letters: T packed tokens, K ropes of the model, D rotary channels.

    Args:
        arch: the model.
    """

    def __init__(self, arch: ModelArchitecture) -> None:
        super().__init__()
        # Not a buffer, which a cast of the model would round.
        self.inv_freq = torch.stack([rotary_inverse_frequencies(rope, arch.turned_channels) for rope in arch.ropes])
        self.interleaved = arch.rotary_interleaved

    def forward(self, position_ids: Tensor) -> Tensor:
        """fp32 ``[K, T, 1, 1, D]`` angles of ``position_ids``, int64 ``[T]``.

        A layer's own are then without gaps in memory, which fused kernels take for granted.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids.to(self.inv_freq.dtype)[:, None, None, None] * self.inv_freq[:, None, None, None]
        if self.interleaved:
            return torch.stack([angles, angles], dim=-1).flatten(-2)
        return torch.cat([angles, angles], dim=-1)


def rotary_inverse_frequencies(rope: Rope, channels: int) -> Tensor:
    """fp32 ``[channels / 2]`` inverse frequencies of rotary embeddings, scaled as they say.

    Source: the rope types of Hugging Face configs, ``modeling_rope_utils`` of transformers.

    Args:
        rope: the embeddings.
        channels: how many channels of a head they turn.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
    frequencies = 1.0 / (rope.base**exponents)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case LongRopeScaling(short_factors):
            return frequencies / torch.tensor(short_factors)
        case Llama3Scaling():
            return _scale_llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _scale_yarn(frequencies, rope.scaling, rope.base)


def _scale_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths beyond the original context over ``low_freq_factor`` are slowed, those under it over the high one kept."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    blend = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = wavelengths > context / scaling.low_freq_factor
    fast = wavelengths < context / scaling.high_freq_factor
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))


def _scale_yarn(frequencies: Tensor, scaling: YarnScaling, base: float) -> Tensor:
    """From pair ``low`` on frequencies go over to slow ones, linearly until pair ``high``."""
    channels = 2 * frequencies.numel()

    def pair_that_turns(times: float) -> float:
        return channels * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(frequencies.numel(), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * slow + frequencies * (1 - slow)
