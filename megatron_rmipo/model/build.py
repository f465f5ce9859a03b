"""The policy as Megatron-Core builds it: its configuration, its layer spec with our attention inside, this rank's part of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_rmipo.config.schema import Config, ExpertsConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.model.attention.packed import PackedAttention, choose_backend
from megatron_rmipo.model.attention.scores import ScoreRules
from megatron_rmipo.model.experts import expert_layer, expert_settings
from megatron_rmipo.model.norms import RMSNorm, WholeNorm
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.model.residual import place_norms
from megatron_rmipo.model.transformer_engine import NO_TRANSFORMER_ENGINE, transformer_engine_available
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


def _quick_gelu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "clamped_swiglu": _quick_gelu}


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
        rules = ScoreRules(window=kind.window, softcap=arch.attention_softcap, sinks=arch.attention_sinks)
        core_attention = ModuleSpec(module=PackedAttention, params={"backend": backend, "rules": rules})
        submodules = dataclasses.replace(submodules, core_attention=core_attention)
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
        """As Megatron's, with this layer's angles out of those of all kinds, ``[T, 1, K, D]``."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = None if self.rope is None else rotary_pos_emb[:, :, self.rope : self.rope + 1]
        output: tuple[Tensor, Tensor | None] = super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        return output


def transformer_config(
    arch: ModelArchitecture,
    groups: ProcessGroups,
    *,
    dtype: torch.dtype = torch.float32,
    transformer_impl: str = "auto",
    fp8_format: str | None = None,
    fp8_recipe: str | None = None,
    sequence_parallel: bool = False,
    recompute_granularity: str | None = None,
    recompute_method: str | None = None,
    recompute_num_layers: int | None = None,
    experts: ExpertsConfig | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's TransformerConfig of a model of the Llama kind, for packed rows of varying length.

    Args:
        arch: the model.
        groups: gives the tensor and pipeline parallel sizes.
        dtype: fp32 or bf16 parameters and activations.
        transformer_impl: ``local`` (Megatron-Core's own layers), ``transformer_engine``, or ``auto``: the latter where it is
            installed and there is a GPU.
        fp8_format: ``hybrid`` or ``e4m3``: the layers' matrix products in fp8, in Transformer Engine; None in ``dtype``.
        fp8_recipe: how their scales are found, by Megatron's names; None is its default, ``delayed``.
        sequence_parallel: shard norms and residuals along the row over the tensor-parallel group.
        recompute_granularity, recompute_method, recompute_num_layers: Megatron's activation recomputation.
        experts: how tokens reach experts, and what is done about their load, in a model that has them.
        **overrides: further TransformerConfig fields.

    Raises:
        ConfigError: Transformer Engine is asked for and absent, or the model's router is not built.
    """
    on_gpu, use_te = torch.cuda.is_available(), _uses_transformer_engine(transformer_impl, fp8_format)
    settings: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "softmax_scale": arch.attention_scale,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": arch.zero_centered_norm,
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[arch.activation],
        "activation_func_clamp_value": arch.activation_limit,
        "glu_linear_offset": float(arch.activation == "clamped_swiglu"),
        "add_bias_linear": arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "rotary_interleaved": arch.rotary_interleaved,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # The schedule then divides gradients by the number of pairs of the global batch, not by micro-batches.
        "calculate_per_token_loss": True,
        # Packs differ in length, so stages tell each other the shape.
        "variable_seq_lengths": groups.pp_size > 1,
        # The default dispatcher is refused with variable lengths, even in a model without experts.
        "moe_token_dispatcher_type": "alltoall",
        "recompute_granularity": recompute_granularity,
        "recompute_method": recompute_method,
        "recompute_num_layers": recompute_num_layers,
        "use_cpu_initialization": not on_gpu,
        "transformer_impl": "transformer_engine" if use_te else "local",
        # The kernel for tensors that are not THD turns each token by its own row of our table, so positions may restart.
        "apply_rope_fusion": use_te,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": on_gpu,
        # Megatron's fused GELU is the approximation by tanh under the name of the exact one; where it clamps, it does so before
        # it adds a bias.
        "bias_activation_fusion": on_gpu and arch.activation == "silu",
        "gradient_accumulation_fusion": on_gpu and _gradient_accumulation_kernel_available(),
        "batch_p2p_comm": on_gpu,
    }
    if fp8_format is not None:
        # Data-parallel ranks run different numbers of packs, and so could not meet to agree on the scales.
        settings.update(fp8=fp8_format, fp8_recipe=fp8_recipe or "delayed", tp_only_amax_red=True)
    settings.update(expert_settings(arch, groups, experts or ExpertsConfig()))
    return TransformerConfig(**{**settings, **overrides})


def _uses_transformer_engine(transformer_impl: str, fp8_format: str | None) -> bool:
    available = transformer_engine_available()
    asked_for = "--transformer-impl transformer_engine" if transformer_impl == "transformer_engine" else None
    if fp8_format is not None:
        asked_for = f"--fp8-format {fp8_format}"
    if asked_for and not available:
        raise ConfigError(f"{asked_for}: {NO_TRANSFORMER_ENGINE}")
    return available and transformer_impl != "local"


def _gradient_accumulation_kernel_available() -> bool:
    try:
        import fused_weight_gradient_mlp_cuda  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return True


def build_policy(
    arch: ModelArchitecture,
    config: TransformerConfig,
    groups: ProcessGroups,
    *,
    attention_backend: str = "auto",
    make_vocab_size_divisible_by: int = 128,
    chunk_size: int = 4096,
) -> PolicyModel:
    """Build this rank's part of the policy, with random weights. Every rank calls it together.

    Args:
        arch: the model.
        config: from :func:`transformer_config`; its ``transformer_impl`` says whose layers are built.
        groups: the process groups of this rank.
        attention_backend: ``sdpa``, ``flex``, ``te`` (Transformer Engine, in layers of either kind), or ``auto``: flex on a GPU
            and with heads of 16 or more, sdpa elsewhere.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.
        chunk_size: vocabulary entries whose logits exist at a time.

    Raises:
        ConfigError: Transformer Engine's attention is asked for and absent.
    """
    backend = choose_backend(attention_backend, arch.kv_channels)
    if backend == "te" and not transformer_engine_available():
        raise ConfigError(f"--attention-backend te: {NO_TRANSFORMER_ENGINE}")
    model = PolicyModel(
        config,
        _block_spec(arch, config, backend),
        arch,
        groups,
        vocab_size=padded_vocab_size(arch.vocab_size, make_vocab_size_divisible_by, groups.tp_size),
        chunk_size=chunk_size,
    )
    model.to(current_device())
    return model


def _block_spec(arch: ModelArchitecture, config: TransformerConfig, attention_backend: str) -> TransformerBlockSubmodules:
    """Megatron's own layer spec with our attention inside, and norms that allow sequence parallelism."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if arch.qk_norm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    place_norms(layer, arch, config)
    attention = layer.submodules.self_attention
    attention.module = Attention
    attention.params = {**attention.params, "arch": arch, "backend": attention_backend}
    sparse = expert_layer(layer, arch, config, norm) if arch.experts else layer
    first = get_transformer_layer_offset(config)
    layers = range(first, first + get_num_layers_to_build(config))
    specs = [sparse if arch.has("expert_layers", number) else layer for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def build_model(arch: ModelArchitecture, config: Config, groups: ProcessGroups) -> PolicyModel:
    """This rank's part of the policy with random weights. All ranks call it together."""
    megatron_config = transformer_config(
        arch,
        groups,
        dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        transformer_impl=config.model.transformer_impl,
        fp8_format=config.model.fp8_format,
        fp8_recipe=config.model.fp8_recipe,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute_granularity=config.model.recompute_granularity,
        recompute_method=config.model.recompute_method,
        recompute_num_layers=config.model.recompute_num_layers,
        experts=config.experts,
    )
    return build_policy(
        arch,
        megatron_config,
        groups,
        attention_backend=config.model.attention_backend,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        chunk_size=config.model.logprob_chunk_size,
    )
