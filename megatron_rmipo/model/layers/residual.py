"""The residual stream: how tokens enter it, and how what attention and MLP give is added to it.

Shape letters: T packed tokens of a rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.layers.norms import RMSNorm

# Checkpoints hold a norm after a projection beside that projection, as Megatron-Bridge does.
_CHECKPOINT_NAMES = {
    "self_attn_bda.post_layernorm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.post_layernorm.": "mlp.linear_fc2.post_layernorm.",
}


class ResidualSum(torch.nn.Module):
    """Stands as a layer's ``self_attn_bda`` or ``mlp_bda``: norms and multiplies what is added to the residual stream.

    Args:
        config: the layers'.
        arch: the model: ``post_norm`` and ``residual_multiplier`` are read.
    """

    def __init__(self, config: TransformerConfig, arch: ModelArchitecture) -> None:
        super().__init__()
        assert config.hidden_dropout == 0.0, "dropout would make the loss depend on how the batch is cut"
        norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if arch.post_norm else IdentityOp()
        self.post_layernorm, self.multiplier = norm, arch.residual_multiplier

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """What adds; Megatron asks for it so, and calls it with an output ``[T, 1, H]`` and its bias, the stream, no dropout."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        # Megatron turns gradients on around this call, whatever the pass.
        with torch.set_grad_enabled(output.requires_grad or residual.requires_grad):
            added: Tensor = self.post_layernorm(output if bias is None else output + bias)
            return residual + (added if self.multiplier == 1.0 else added * self.multiplier)


class ScaledEmbedding(LanguageModelEmbedding):
    """Megatron's embedding, which multiplies the tokens it embeds."""

    multiplier: float
    rounded: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, times the multiplier, which first is rounded to the dtype of the hidden states where a model does so."""
        embedded: Tensor = super().forward(*args, **kwargs)
        return embedded * (embedded.new_tensor(self.multiplier) if self.rounded else self.multiplier)


def scale_embedding(model: Any, arch: ModelArchitecture) -> None:
    """Make the embedding of a model, where this rank has it, multiply as the architecture says."""
    if model.pre_process and arch.embedding_multiplier != 1.0:
        model.embedding.__class__ = ScaledEmbedding
        model.embedding.multiplier, model.embedding.rounded = arch.embedding_multiplier, arch.embedding_multiplier_rounded


def place_norms(layer: ModuleSpec, arch: ModelArchitecture, config: TransformerConfig) -> None:
    """Change a layer spec of Megatron's, whose norms stand before attention and MLP, into one as the architecture says."""
    parts = layer.submodules
    if not arch.pre_norm:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        if config.transformer_impl == "transformer_engine":
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

            # In Transformer Engine's layers the norm before a linear is part of it.
            parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
            parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    if arch.post_norm or arch.residual_multiplier != 1.0:
        add = ModuleSpec(module=ResidualSum, params={"config": config, "arch": arch})
        parts.self_attn_bda = parts.mlp_bda = add
        parts.sharded_state_dict_keys_map = {**parts.sharded_state_dict_keys_map, **_CHECKPOINT_NAMES}
