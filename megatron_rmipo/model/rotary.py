"""Rotary embeddings of packed rows: the angles of each token's own position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture, Rope, RopeScaling


class PackedRotary(torch.nn.Module):
    """Stands as a model's ``rotary_pos_emb``: gives the angles of positions, which restart where a prompt ended.

    Shape letters: T packed tokens, K ropes of the model, D rotary channels.

    Args:
        arch: the model.
    """

    def __init__(self, arch: ModelArchitecture) -> None:
        super().__init__()
        channels = arch.kv_channels if arch.rotary_channels is None else arch.rotary_channels
        # Not a buffer, which a cast of the model would round.
        self.inv_freq = torch.stack([rotary_inverse_frequencies(rope, channels) for rope in arch.ropes])
        self.interleaved = arch.rotary_interleaved

    def forward(self, position_ids: Tensor) -> Tensor:
        """fp32 ``[T, 1, K, D]`` angles of ``position_ids``, int64 ``[T]``."""
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids.to(self.inv_freq.dtype)[:, None, None, None] * self.inv_freq
        if self.interleaved:
            return torch.stack([angles, angles], dim=-1).flatten(-2)
        return torch.cat([angles, angles], dim=-1)


def rotary_inverse_frequencies(rope: Rope, channels: int) -> Tensor:
    """fp32 ``[channels / 2]`` inverse frequencies of rotary embeddings, with ``llama3`` scaling where they have it.

    Source: the ``llama3`` rope type of Hugging Face configs: wavelengths beyond the original context over
    ``low_freq_factor`` are slowed by ``factor``, those under it over ``high_freq_factor`` kept, the band between blended.

    Args:
        rope: the embeddings.
        channels: how many channels of a head they turn.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
    frequencies = 1.0 / (rope.base**exponents)
    return frequencies if rope.scaling is None else _scale_llama3(frequencies, rope.scaling)


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    blend = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = wavelengths > context / scaling.low_freq_factor
    fast = wavelengths < context / scaling.high_freq_factor
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))
