"""The policy as Megatron-Core builds it: its configuration, its layer spec with our attention inside, this rank's part of it.

Shape letter: H hidden.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.model.attention.latent import LatentSelfAttention
from megatron_rmipo.model.attention.packed import choose_backend, core_attention_of
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.model.transformer_engine import NO_TRANSFORMER_ENGINE, transformer_engine_available
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

# With latent attention Megatron's local layers would name norms in checkpoints as in the model, Transformer Engine's name them by
# the linears that own them.
_LATENT_KEYS = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for the local layer spec, of hidden states, or of the channels of each head.

    Megatron-Core's wrapper around torch's norm refuses sequence parallelism; this one marks its weight, so that Megatron sums
    its gradient over the tensor-parallel group.

    Args:
        config: ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: how many channels are normed together: H, or those of a head.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension (statistics in fp32 for lower dtypes)."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


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
        super().__init__(own_config, submodules, layer_number, *args, **kwargs)
        # What training sets in the layers' configuration later is seen here, too.
        self.config = config
        self.rope = kind.rope

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
        **overrides: further TransformerConfig fields.

    Raises:
        ConfigError: Transformer Engine is asked for and absent.
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
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        # Not of latents, whose norms' gradients are whole on every rank: Megatron would sum them.
        "qk_layernorm": arch.qk_norm,
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
        "bias_activation_fusion": on_gpu,
        "gradient_accumulation_fusion": on_gpu and _gradient_accumulation_kernel_available(),
        "batch_p2p_comm": on_gpu,
    }
    if fp8_format is not None:
        # Data-parallel ranks run different numbers of packs, and so could not meet to agree on the scales.
        settings.update(fp8=fp8_format, fp8_recipe=fp8_recipe or "delayed", tp_only_amax_red=True)
    if arch.latent is None:
        return TransformerConfig(**{**settings, **overrides})
    latent = {
        "q_lora_rank": arch.latent.q_lora_rank,
        "kv_lora_rank": arch.latent.kv_lora_rank,
        "qk_head_dim": arch.latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": arch.latent.qk_rope_head_dim,
        "v_head_dim": arch.latent.v_head_dim,
        "rope_type": "rope",
        # Its fused kernel turns yarn's angles of whole rows.
        "apply_rope_fusion": False,
    }
    return MLATransformerConfig(**{**settings, **latent, **overrides})


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
    backend = choose_backend(attention_backend, arch.least_head_size)
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
    has_latents = arch.latent is not None
    kinds = {"qk_layernorm": arch.qk_norm or has_latents, "multi_latent_attention": has_latents}
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, final_norm = get_gpt_layer_with_transformer_engine_spec(**kinds), TENorm
    else:
        layer, final_norm = get_gpt_layer_local_spec(normalization="RMSNorm", **kinds), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if has_latents:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.kv_layernorm = RMSNorm
            layer.submodules.sharded_state_dict_keys_map = _LATENT_KEYS
        elif arch.qk_norm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    attention = layer.submodules.self_attention
    attention.module = LatentSelfAttention if has_latents else Attention
    attention.params = {**attention.params, "arch": arch, "backend": attention_backend}
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=final_norm)


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
    )
    return build_policy(
        arch,
        megatron_config,
        groups,
        attention_backend=config.model.attention_backend,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        chunk_size=config.model.logprob_chunk_size,
    )
