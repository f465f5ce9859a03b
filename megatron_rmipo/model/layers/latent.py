"""Multi-head latent attention over packed rows: Megatron's, with our positions, and right without sequence parallelism.

Source: DeepSeek-V2 (arXiv:2405.04434, section 2.1). Queries, and keys with their values, come out of narrow latents; one key of
rotated channels is shared by all heads.

Shape letters: T packed tokens, H hidden, A heads of this rank, N channels of a head that are not turned, R that are, E size of a
value, Q and C ranks of the latents of queries, and of keys and values.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.attention.packed import core_attention_of
from megatron_rmipo.runtime.groups import current_device

_NORMS_AND_WHAT_FOLLOWS = ("q_layernorm", "kv_layernorm", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")

if not isinstance(multi_latent_attention.TELinear, type):
    # Megatron-Core 0.16 takes the stand-ins of its wrappers of Transformer Engine for the real ones here, and fails.
    multi_latent_attention.HAVE_TE = False


class LatentSelfAttention(MLASelfAttention):
    """Megatron's latent attention, its modules and their names, around packed attention.

    What is its own: the angles are those of each token's position, which Megatron's own would count from the start of the row.
    The local layers' projections into latents are whole on every tensor-parallel rank, as those of Transformer Engine are;
    Megatron cuts them there, and loses what other ranks' heads have to say to the gradient of the shared key.

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
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        arch: ModelArchitecture,
        backend: str,
        layers_each: int = 1,
        **kwargs: Any,
    ) -> None:
        kind = arch.kind_of((layer_number - 1) // layers_each)
        submodules = dataclasses.replace(submodules, core_attention=core_attention_of(arch, kind, backend))
        assert arch.latent is not None
        own_config = copy.copy(config)
        own_config.layernorm_epsilon = arch.latent.norm_epsilon
        super().__init__(own_config, submodules, layer_number, *args, **kwargs)
        # What training sets in the layers' configuration later is seen here, too.
        self.config = config
        if self.core_attention.computes_anew:
            self.checkpoint_core_attention = False
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            projection = getattr(self, name, None)
            if isinstance(projection, ColumnParallelLinear):
                setattr(self, name, WholeLinear(config, projection.input_size, projection.output_size))
        self.rope = kind.rope
        # Turned queries and keys have it each.
        self.turned_factor = 1.0 if kind.rope is None else arch.ropes[kind.rope].attention_factor ** 2
        # Megatron would take neighbours for pairs whatever the flag says.
        self.rotary_config = copy.copy(config)
        self.rotary_config.multi_latent_attention = False
        self.rotary_config.rotary_interleaved = arch.rotary_interleaved

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        # From Megatron-Core 0.19 on; its own wants a norm before queries that are made without a latent, too.
        return {name: getattr(submodules, name) for name in _NORMS_AND_WHAT_FOLLOWS}

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, with the angles of all kinds of layers, ``[K, T, 1, 1, R]``."""
        angles = None if rotary_pos_emb is None or self.rope is None else rotary_pos_emb[self.rope]
        # What Megatron hands on, without a look at it, to the method below.
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, *args, **{**kwargs, "position_ids": angles}
        )
        return output

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: None = None, position_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of a row.

        Args:
            hidden_states: ``[T, 1, H]``; ``[T / tp, 1, H]`` under sequence parallelism.
            key_value_states: None.
            position_ids: the angles, ``[T, 1, 1, R]``, or None where nothing is turned.
            *args, **kwargs: Megatron passes them; segments say it all.

        Returns:
            Queries and keys ``[T, 1, A, N + R]``, values ``[T, 1, A, E]``; then both latents, ``[.., 1, Q]`` and ``[.., 1, C]``.
        """
        config, angles = self.config, position_ids
        query_latent = hidden_states
        if config.q_lora_rank is not None:
            query_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        latent, turned_key = self.linear_kv_down_proj(hidden_states)[0].split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
        )
        latent = self.kv_layernorm(latent)
        # Every rank turns it for its own heads: backward, their gradients are summed.
        if config.sequence_parallel:
            turned_key = gather_from_sequence_parallel_region(turned_key, group=self.pg_collection.tp)
        else:
            turned_key = copy_to_tensor_model_parallel_region(turned_key, group=self.pg_collection.tp)
        if self.recompute_up_proj:
            # Megatron's forward drops what this made once attention has it, and has it made anew in the backward pass.
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=config.fp8)
            query, key, value = self.qkv_up_checkpoint.checkpoint(self._up, query_latent, latent, turned_key, angles)
        else:
            query, key, value = self._up(query_latent, latent, turned_key, angles)
        return query, key, value, query_latent, latent

    def _up(
        self, query_latent: Tensor, latent: Tensor, turned_key: Tensor, angles: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values out of both latents and the shared key, ``[T, 1, R]``."""
        config, heads = self.config, self.num_attention_heads_per_partition
        up = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        query, key_value = up(query_latent)[0], self.linear_kv_up_proj(latent)[0]
        key, value = key_value.unflatten(-1, (heads, -1)).split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query, turned_query = query.unflatten(-1, (heads, -1)).split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        turned_key = self._turned(turned_key[:, :, None], angles).expand(-1, -1, heads, -1)
        turned_query = self._turned(turned_query, angles)
        if self.turned_factor != 1.0:
            turned_query = turned_query * self.turned_factor
        query = torch.cat([query, turned_query], dim=-1)
        return query, torch.cat([key, turned_key], dim=-1), value

    def _turned(self, tensor: Tensor, angles: Tensor | None) -> Tensor:
        if angles is None:
            return tensor
        turned: Tensor = apply_rotary_pos_emb(tensor, angles, config=self.rotary_config, cp_group=self.pg_collection.cp)
        return turned


class WholeLinear(torch.nn.Module):
    """A projection without bias that every tensor-parallel rank holds whole.

    Args:
        config: ``params_dtype``, ``init_method`` and ``sequence_parallel`` are read.
        input_size, output_size: channels.
    """

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            with torch.no_grad():
                config.init_method(self.weight)
        # Each rank then sees its part of the row, and Megatron sums the gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """``[..., output]`` of ``[..., input]``, and no bias, as Megatron's projections answer."""
        return self._forward_impl(hidden, self.weight), None

    def _forward_impl(self, input: Tensor, weight: Tensor) -> Tensor:
        # Apart, as in Megatron's layers, for weights that are kept in another form.
        return F.linear(input, weight)
