"""Megatron-Core's configuration of a model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import num_chunks
from megatron_rmipo.config.schema import ExpertsConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.megatron_fields import latent_fields, megatron_fields
from megatron_rmipo.model.layers.experts import expert_settings
from megatron_rmipo.model.transformer_engine import NO_TRANSFORMER_ENGINE, transformer_engine_available
from megatron_rmipo.runtime.groups import ProcessGroups

if not megatron_random.HAVE_TE:
    # What computes norms anew takes its own default, False, for fp8, which only None is not, and asks Transformer Engine.
    megatron_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _quick_gelu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "clamped_swiglu": _quick_gelu}


def transformer_config(
    arch: ModelArchitecture,
    groups: ProcessGroups,
    *,
    dtype: torch.dtype = torch.float32,
    transformer_impl: str = "auto",
    fp8_format: str | None = None,
    fp8_recipe: str | None = None,
    sequence_parallel: bool = False,
    cp_comm_type: str = "all_gather",
    recompute_granularity: str | None = None,
    recompute_method: str | None = None,
    recompute_num_layers: int | None = None,
    recompute_modules: Sequence[str] | None = None,
    experts: ExpertsConfig | None = None,
    parallel: ParallelConfig | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's TransformerConfig of a model, for packed rows of varying length.

    Args:
        arch: the model.
        groups: gives the tensor, pipeline and context parallel sizes.
        dtype: fp32 or bf16 parameters and activations.
        transformer_impl: ``local`` (Megatron-Core's own layers), ``transformer_engine``, or ``auto``: the latter where it is
            installed and there is a GPU.
        fp8_format: ``hybrid`` or ``e4m3``: the layers' matrix products in fp8, in Transformer Engine; None in ``dtype``.
        fp8_recipe: how their scales are found, by Megatron's names; None is its default, ``delayed``.
        sequence_parallel: shard norms and residuals along the row over the tensor-parallel group.
        cp_comm_type: how ranks that share a row attend to each other's tokens, ``all_gather`` or ``a2a``.
        recompute_granularity, recompute_method, recompute_num_layers, recompute_modules: Megatron's activation recomputation.
        experts: how tokens reach experts, and what is done about their load, in a model that has them.
        parallel: how layers are split over pipeline stages; None: evenly.
        **overrides: further TransformerConfig fields.

    Raises:
        ConfigError: Transformer Engine is asked for and absent, or the model's router is not built.
    """
    on_gpu, use_te = torch.cuda.is_available(), _uses_transformer_engine(transformer_impl, fp8_format)
    settings: dict[str, Any] = {
        **megatron_fields(arch),
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[arch.activation],
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "context_parallel_size": groups.cp_size,
        "cp_comm_type": cp_comm_type,
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
        # Megatron appends to the list it is given.
        "recompute_modules": None if recompute_modules is None else [*recompute_modules],
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
        **_pipeline_split(arch, parallel),
    }
    if fp8_format is not None:
        # Data-parallel ranks run different numbers of packs, and so could not meet to agree on the scales.
        settings.update(fp8=fp8_format, fp8_recipe=fp8_recipe or "delayed", tp_only_amax_red=True)
    settings.update(expert_settings(arch, groups, experts or ExpertsConfig()))
    if arch.latent is None:
        return TransformerConfig(**{**settings, **overrides})
    # The fused kernel of latent attention turns yarn's angles of whole rows.
    return MLATransformerConfig(**{**settings, **latent_fields(arch.latent), "apply_rope_fusion": False, **overrides})


def _pipeline_split(arch: ModelArchitecture, parallel: ParallelConfig | None) -> dict[str, Any]:
    """Megatron's fields of which stage, and which chunk of it, holds which layers."""
    if parallel is None:
        return {}
    chunks = num_chunks(arch.num_layers, parallel)
    fields: dict[str, Any] = {
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
    }
    if chunks > 1:
        # Chunks make each of two ranks the one before and behind the other. Messages of both directions in one batch, Megatron
        # would take for each other.
        fields |= {"virtual_pipeline_model_parallel_size": chunks, "batch_p2p_comm": False}
    return fields


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
