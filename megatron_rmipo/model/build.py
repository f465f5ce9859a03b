"""The policy as Megatron-Core builds it: its configuration, its layer spec with our attention inside, this rank's part of it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import stage_layers
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.model.attention.packed import choose_backend
from megatron_rmipo.model.hybrid import LAYERS_EACH, NO_HYBRID_MODEL, HybridPolicy, hybrid_config, hybrid_stack
from megatron_rmipo.model.layers.activation_offloading import offload_by_row
from megatron_rmipo.model.layers.experts import expert_layer, keep_experts_apart, let_go_of_graphs
from megatron_rmipo.model.layers.latent import LatentSelfAttention
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.model.layers.residual import place_norms
from megatron_rmipo.model.layers.self_attention import Attention
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import GPTPolicy, Policy, PolicyModel
from megatron_rmipo.model.transformer_engine import NO_TRANSFORMER_ENGINE, transformer_engine_available
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

# With latent attention Megatron's local layers would name norms in checkpoints as in the model, Transformer Engine's name them by
# the linears that own them.
_LATENT_KEYS = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def build_policy(
    arch: ModelArchitecture,
    config: TransformerConfig,
    groups: ProcessGroups,
    *,
    attention_backend: str = "auto",
    make_vocab_size_divisible_by: int = 128,
    chunk_size: int = 4096,
    model_class: str = "gpt",
    parallel: ParallelConfig | None = None,
    vp_stage: int | None = None,
) -> PolicyModel:
    """Build this rank's part of the policy, or a chunk of it, with random weights. Every rank calls it together.

    Args:
        arch: the model.
        config: from :func:`transformer_config`; its ``transformer_impl`` says whose layers are built.
        groups: the process groups of this rank.
        attention_backend: ``sdpa``, ``flex``, ``te`` (Transformer Engine, in layers of either kind), or ``auto``: flex on a GPU
            and with heads of 16 or more, sdpa elsewhere.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.
        chunk_size: vocabulary entries whose logits exist at a time.
        model_class: of Megatron's, ``gpt`` or ``hybrid``; both compute the same.
        parallel: how layers are split over pipeline stages, as the configuration has it; None: evenly.
        vp_stage: number of the chunk in an interleaved pipeline; None in any other.

    Raises:
        ConfigError: Transformer Engine's attention is asked for and absent, or the class is.
    """
    backend = choose_backend(attention_backend, arch.least_head_size)
    if backend == "te" and not transformer_engine_available():
        raise ConfigError(f"--attention-backend te: {NO_TRANSFORMER_ENGINE}")
    vocab_size = padded_vocab_size(arch.vocab_size, make_vocab_size_divisible_by, groups.tp_size)
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "chunk_size": chunk_size, "vp_stage": vp_stage}
    model: PolicyModel
    if model_class == "hybrid":
        if HybridPolicy is None:
            raise ConfigError(f"--model-class hybrid: {NO_HYBRID_MODEL}.")
        stack = hybrid_stack(*_layer_specs(arch, config, backend, layers_each=LAYERS_EACH))
        stages = stage_layers(arch.num_layers, parallel or ParallelConfig(pipeline_model_parallel_size=groups.pp_size))
        model = HybridPolicy(hybrid_config(config), stack, arch, groups, stages=stages, **sizes)
    else:
        block = _block_spec(arch, config, backend, vp_stage)
        model = GPTPolicy(config, block, arch, groups, **sizes)
    model.to(current_device())
    keep_experts_apart(model)
    let_go_of_graphs(model)
    offload_by_row(model)
    return model


def _block_spec(
    arch: ModelArchitecture, config: TransformerConfig, attention_backend: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this stage of a GPTModel, or of a chunk of it."""
    dense, sparse, norm = _layer_specs(arch, config, attention_backend)
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    specs = [sparse if arch.has("expert_layers", number) else dense for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_specs(
    arch: ModelArchitecture, config: TransformerConfig, attention_backend: str, layers_each: int = 1
) -> tuple[ModuleSpec, ModuleSpec, Any]:
    """Megatron's own spec of a dense and of a sparse layer with our attention inside, and norms that allow sequence parallelism.

    Returns:
        The two (the same in a model without experts), and the class of norms.
    """
    has_latents = arch.latent is not None
    kinds = {"qk_layernorm": arch.qk_norm or has_latents, "multi_latent_attention": has_latents}
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(**kinds), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm", **kinds), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if has_latents:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.kv_layernorm = RMSNorm
            layer.submodules.sharded_state_dict_keys_map = _LATENT_KEYS
        elif arch.qk_norm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    place_norms(layer, arch, config)
    attention = layer.submodules.self_attention
    attention.module = LatentSelfAttention if has_latents else Attention
    attention.params = {**attention.params, "arch": arch, "backend": attention_backend, "layers_each": layers_each}
    return layer, expert_layer(layer, arch, config, norm) if arch.experts else layer, norm


def build_model(arch: ModelArchitecture, config: Config, groups: ProcessGroups) -> Policy:
    """This rank's part of the policy with random weights. All ranks call it together."""
    megatron_config = transformer_config(
        arch,
        groups,
        dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        transformer_impl=config.model.transformer_impl,
        fp8_format=config.model.fp8_format,
        fp8_recipe=config.model.fp8_recipe,
        sequence_parallel=config.parallel.sequence_parallel,
        cp_comm_type=config.parallel.cp_comm_type,
        recompute_granularity=config.model.recompute_granularity,
        recompute_method=config.model.recompute_method,
        recompute_num_layers=config.model.recompute_num_layers,
        recompute_modules=config.memory.recompute_modules,
        fine_grained_activation_offloading=config.memory.fine_grained_activation_offloading,
        offload_modules=[*(config.memory.offload_modules or [])],
        min_offloaded_tensor_size=config.memory.min_offloaded_tensor_size,
        experts=config.experts,
        parallel=config.parallel,
    )
    return build_chunks(
        arch,
        megatron_config,
        groups,
        attention_backend=config.model.attention_backend,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        chunk_size=config.model.logprob_chunk_size,
        model_class=config.model.model_class,
        parallel=config.parallel,
    )


def build_chunks(arch: ModelArchitecture, config: TransformerConfig, groups: ProcessGroups, **options: Any) -> Policy:
    """What :func:`build_policy` builds, with its options, for each chunk of this rank."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    stages = range(num_chunks) if num_chunks else [None]
    return Policy(build_policy(arch, config, groups, vp_stage=vp_stage, **options) for vp_stage in stages)
