"""A policy of Megatron-Core's HybridModel, where there is one (0.19 on): its stack counts attention and MLP as a layer each.

Upstream develops HybridModel and accepts only fixes of GPTModel. What is computed, and the keys of checkpoints, are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.policy import PolicyModel, model_arguments
from megatron_rmipo.runtime.groups import ProcessGroups

LAYERS_EACH = 2
NO_HYBRID_MODEL = (
    "the installed megatron-core has no HybridModel; 0.19, for Python 3.12, has (make venv PYTHON=python3.12). Leave the flag "
    "out to train the same model as a GPTModel"
)

HybridModel: Any
HybridPolicy: Any
try:
    from megatron.core.models.hybrid import hybrid_block, hybrid_model
except ImportError:
    HybridModel = HybridPolicy = None
else:
    HybridModel = hybrid_model.HybridModel

    class DecoderStack(hybrid_block.HybridStack):
        """Megatron's stack with the final norm it is given, whose checkpoints have the keys of GPTModel's.

        Args:
            config, submodules: the stack's.
            final_norm: class of the norm behind the last layer; Megatron's own stack knows Transformer Engine's alone.
            **kwargs: the stack's.
        """

        def __init__(self, config: TransformerConfig, submodules: Any, *, final_norm: Any, **kwargs: Any) -> None:
            super().__init__(config, submodules, post_layer_norm=False, **kwargs)
            if self.post_process:
                self.post_layer_norm = True
                self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            """This rank's weights under the keys that GPTModel has for them."""
            sharded: dict[str, Any] = {}
            num_blocks = self.config.num_layers // LAYERS_EACH
            # As Megatron's TransformerBlock has it: layers that are all alike are slices of one tensor.
            apart = self.config.hetereogenous_dist_checkpoint or self.config.moe_layer_freq != 1
            for place, layer in enumerate(self.layers):
                block = (layer.layer_number - 1) // LAYERS_EACH
                own, key = f"{prefix}layers.{place}.", f"{prefix}layers.{block}." if apart else f"{prefix}layers."
                offsets = [] if apart else [(0, block, num_blocks)]
                of_layer = layer.sharded_state_dict(own, offsets, metadata)
                replace_prefix_for_sharding(of_layer, own, key)
                sharded.update(of_layer)
            if self.post_process:
                own = f"{prefix}final_norm."
                of_norm = sharded_state_dict_default(self.final_norm, own, sharded_offsets, metadata, tp_group=self.tp_group)
                replace_prefix_for_sharding(of_norm, own, f"{prefix}final_layernorm.")
                sharded.update(of_norm)
            return sharded

    class HybridModelPolicy(PolicyModel, hybrid_model.HybridModel):
        """A policy of the class HybridModel.

        Args:
            config: of :func:`hybrid_config`.
            spec: of :func:`hybrid_stack`.
            arch, groups, vocab_size, chunk_size, vp_stage: as of :class:`megatron_rmipo.model.policy.GPTPolicy`.
            stages: layers by stage, by chunk.
        """

        layers_each = LAYERS_EACH

        def __init__(
            self,
            config: TransformerConfig,
            spec: ModuleSpec,
            arch: ModelArchitecture,
            groups: ProcessGroups,
            *,
            vocab_size: int,
            chunk_size: int,
            stages: Sequence[Sequence[range]],
            vp_stage: int | None = None,
        ) -> None:
            super().__init__(
                config=config,
                hybrid_stack_spec=spec,
                vocab_size=vocab_size,
                hybrid_layer_pattern=layer_pattern(arch, stages),
                **model_arguments(arch, config, groups, vp_stage),
            )
            self.become_policy(arch, chunk_size)

        def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
            """What GPTModel has, which leaves out the output layer's state beside its weight."""
            sharded: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
            sharded.pop(f"{prefix}output_layer._extra_state", None)
            return sharded

    HybridPolicy = HybridModelPolicy


def layer_pattern(arch: ModelArchitecture, stages: Sequence[Sequence[range]]) -> str:
    """The layers as HybridModel writes them: ``*`` attention, ``-`` an MLP, ``E`` experts, ``|`` between chunks of stages."""
    in_order = [layers for chunks in zip(*stages, strict=True) for layers in chunks]
    return "|".join("".join("*E" if arch.has("expert_layers", layer) else "*-" for layer in layers) for layers in in_order)


def hybrid_config(config: TransformerConfig) -> TransformerConfig:
    """The configuration of a GPTModel as HybridModel counts layers, which it splits by its pattern alone."""
    recomputed = config.recompute_num_layers
    return dataclasses.replace(
        config,
        num_layers=LAYERS_EACH * config.num_layers,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        recompute_num_layers=None if recomputed is None else LAYERS_EACH * recomputed,
        is_hybrid_model=True,
    )


def hybrid_stack(dense: ModuleSpec, sparse: ModuleSpec, final_norm: type) -> ModuleSpec:
    """The spec of a stack that computes what layers of a GPTModel do.

    Args:
        dense: such a layer.
        sparse: one with experts, or the same.
        final_norm: class of the norm behind the last layer.
    """
    attention = dataclasses.replace(dense.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    return ModuleSpec(
        module=DecoderStack,
        params={"final_norm": final_norm},
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=dense.module, params=dense.params, submodules=attention),
            mlp_layer=_without_attention(dense),
            moe_layer=_without_attention(sparse),
        ),
    )


def _without_attention(layer: ModuleSpec) -> ModuleSpec:
    submodules = dataclasses.replace(
        layer.submodules, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    return ModuleSpec(module=layer.module, params=layer.params, submodules=submodules)
