"""Self-attention of Megatron-Core that does in each layer what the architecture says of it.

Shape letters: T packed tokens, A query heads of this rank, K ropes of the model, D rotary channels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.attention.packed import core_attention_of
from megatron_rmipo.model.layers.norms import WholeNorm


class Attention(SelfAttention):
    """Self-attention that does in each layer what the architecture says of it, inside Megatron's layers of any kind.

    Its output projection has a bias or not, whatever the MLP has: Megatron's one flag says both.

    Args:
        config: the layers'.
        submodules: Megatron's; their core attention is replaced.
        layer_number: counted from 1 over all stages.
        arch: the model.
        backend: of :class:`megatron_rmipo.model.attention.packed.PackedAttention`.
        layers_each: Megatron's layers that make one of the model's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        arch: ModelArchitecture,
        backend: str,
        layers_each: int = 1,
        **kwargs: Any,
    ) -> None:
        kind = arch.kind_of((layer_number - 1) // layers_each)
        submodules = dataclasses.replace(submodules, core_attention=core_attention_of(arch, kind, backend))
        own_config = copy.copy(config)
        own_config.add_bias_linear = arch.attention_output_bias
        # Turned queries and keys have a factor each; where all of their channels are turned, its square is one of the scores.
        factor = 1.0 if kind.rope is None else arch.ropes[kind.rope].attention_factor ** 2
        if factor != 1.0 and arch.turned_channels == arch.kv_channels:
            own_config.softmax_scale = factor * (arch.attention_scale or 1 / math.sqrt(arch.kv_channels))
            factor = 1.0
        super().__init__(own_config, submodules, layer_number, *args, **kwargs)
        # What training sets in the layers' configuration later is seen here, too.
        self.config = config
        if self.core_attention.computes_anew:
            self.checkpoint_core_attention = False
        self.rope = kind.rope
        self.turned_channels, self.turned_factor = arch.turned_channels, factor
        if arch.qk_norm_whole:
            queries, keys = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
            tp_group, eps = self.pg_collection.tp, config.layernorm_epsilon
            self.q_layernorm = WholeNorm(config, queries * arch.kv_channels, eps, tp_group)
            self.k_layernorm = WholeNorm(config, keys * arch.kv_channels, eps, tp_group)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As Megatron's; those channels of queries, ``[T, 1, A, D]``, that will be turned have the factor of both sides."""
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self.turned_factor != 1.0:
            turned = query[..., : self.turned_channels] * self.turned_factor
            query = torch.cat([turned, query[..., self.turned_channels :]], dim=-1)
        return query, *others

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, with this layer's angles out of those of all kinds, ``[K, T, 1, 1, D]``."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = None if self.rope is None else rotary_pos_emb[self.rope]
        output: tuple[Tensor, Tensor | None] = super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        return output
