"""The policy: Megatron-Core's GPTModel over packed rows, ending in log-probs instead of logits.

Shape letters: T packed tokens, N scored tokens, H hidden, D rotary channels, tp tensor-parallel size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, RopeScaling, padded_vocab_size
from megatron_rmipo.model.attention.packed import PackedAttention, choose_backend
from megatron_rmipo.model.logprobs import ReferenceHead, linear_logprobs, perturbed_linear_logprobs
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for the local layer spec.

    Megatron-Core's wrapper around torch's norm refuses sequence parallelism; this one marks its weight, so that Megatron sums
    its gradient over the tensor-parallel group.

    Args:
        config: ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: H.
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


class LogprobHead(ColumnParallelLinear):
    """The output layer, called for log-probs of targets instead of logits of every token.

    It is a module call, not a function on the bare weight, because DDP gathers a module's parameters in hooks on that call.
    """

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None,
        vocab_size: int,
        chunk_size: int,
        reference: ReferenceHead | None = None,
    ) -> Tensor:
        """fp32 ``[N]`` log-probs of ``target [N]`` under ``hidden [N, H]``; every tensor-parallel rank calls it together.

        With a reference ``[4, N]``, see :func:`megatron_rmipo.model.logprobs.perturbed_linear_logprobs`. The gradient of
        ``hidden`` is left unreduced under sequence parallelism: the gather before it reduce-scatters.
        """
        own_weight = self.weight if weight is None else weight
        options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "chunk_size": chunk_size,
            "reduce_hidden_grad": not self.config.sequence_parallel,
        }
        if reference is not None:
            return perturbed_linear_logprobs(hidden, own_weight, target, reference, self.tp_group, **options)
        return linear_logprobs(hidden, own_weight, target, self.tp_group, **options)


class PolicyModel(GPTModel):
    """GPTModel whose forward takes a packed row and, on the last pipeline stage, returns log-probs of the scored tokens.

    Parameters, their names and ``sharded_state_dict`` are GPTModel's own, so its checkpoints are Megatron checkpoints.
    """

    def __init__(
        self, config: TransformerConfig, spec: Any, arch: ModelArchitecture, groups: ProcessGroups, **kwargs: Any
    ) -> None:
        chunk_size, vocab_size = kwargs.pop("chunk_size"), kwargs.pop("vocab_size")
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(arch.rotary_base),
            pg_collection=groups.megatron_collection(),
            **kwargs,
        )
        self.architecture = arch
        self.chunk_size = chunk_size
        self.rotary_pos_emb.inv_freq = rotary_inverse_frequencies(arch).to(self.rotary_pos_emb.inv_freq.device)
        if self.post_process:
            # The layer stays as GPTModel built it (weight, sharding, tying); only what a call of it computes changes.
            self.output_layer.__class__ = LogprobHead

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        source: Tensor,
        target: Tensor | None,
        reference: ReferenceHead | None = None,
    ) -> Tensor:
        """Run this stage over one packed row. Every tensor-parallel rank of the stage calls it together.

        Args:
            token_ids, position_ids: int64 ``[T]``; T is a multiple of tp under sequence parallelism.
            segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
            source: int64 ``[N]``, the token whose hidden state predicts.
            target: int64 ``[N]``, the id it predicts; None to get the last stage's hidden states instead of log-probs.
            reference: on the last stage: score the targets under mixtures with a reference model, too.

        Returns:
            On the last stage fp32 ``[N]`` log-probs (with a reference ``[4, N]``, see
            :func:`megatron_rmipo.model.logprobs.perturbed_linear_logprobs`; without targets hidden states ``[N, H]``), else
            hidden states ``[T, 1, H]`` (``[T / tp, 1, H]`` under sequence parallelism) for the next stage.
        """
        hidden = self.embedding(input_ids=token_ids[None], position_ids=position_ids[None]) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=segments, rotary_pos_emb=self._rotary_table(position_ids))
        assert isinstance(hidden, Tensor)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp)
        scored = hidden[:, 0].index_select(0, source)
        if target is None:
            return scored
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logprobs: Tensor = self.output_layer(
            scored,
            target,
            weight=weight,
            vocab_size=self.architecture.vocab_size,
            chunk_size=self.chunk_size,
            reference=reference,
        )
        return logprobs

    def head_weight(self) -> Tensor:
        """``[V_padded / tp, H]``: this rank's rows of the output layer, tied or not. On the last stage alone."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _rotary_table(self, position_ids: Tensor) -> Tensor:
        """Angles ``[T, 1, 1, D]`` of each token's own position: a response's positions restart where its prompt ended."""
        rotary = self.rotary_pos_emb
        if rotary.inv_freq.device != position_ids.device:
            rotary.inv_freq = rotary.inv_freq.to(position_ids.device)
        angles = torch.outer(position_ids.to(rotary.inv_freq.dtype), rotary.inv_freq)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def rotary_inverse_frequencies(arch: ModelArchitecture) -> Tensor:
    """fp32 ``[kv_channels / 2]`` inverse frequencies of rotary embeddings, with ``llama3`` scaling where the model has it.

    Source: the ``llama3`` rope type of Hugging Face configs: wavelengths beyond the original context over
    ``low_freq_factor`` are slowed by ``factor``, those under it over ``high_freq_factor`` kept, the band between blended.
    """
    exponents = torch.arange(0, arch.kv_channels, 2, dtype=torch.int64).to(torch.float32) / arch.kv_channels
    frequencies = 1.0 / (arch.rotary_base**exponents)
    scaling = arch.rope_scaling
    return frequencies if scaling is None else _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    blend = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = wavelengths > context / scaling.low_freq_factor
    fast = wavelengths < context / scaling.high_freq_factor
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))


NO_TRANSFORMER_ENGINE = (
    "Transformer Engine is not installed, or there is no GPU. Install the extra with pip install 'megatron_rmipo[te]' on a GPU "
    "machine, or leave the flag out."
)


def transformer_engine_available() -> bool:
    """Whether Megatron-Core found Transformer Engine, and there is a GPU for it."""
    from megatron.core.extensions import transformer_engine

    return bool(getattr(transformer_engine, "HAVE_TE", False)) and torch.cuda.is_available()


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
        "layernorm_epsilon": arch.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
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
        attention_backend: ``sdpa``, ``flex``, ``te`` (Transformer Engine, in layers of either kind), or ``auto``: flex on a GPU,
            sdpa elsewhere.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.
        chunk_size: vocabulary entries whose logits exist at a time.

    Raises:
        ConfigError: Transformer Engine's attention is asked for and absent.
    """
    backend = choose_backend(attention_backend)
    if backend == "te" and not transformer_engine_available():
        raise ConfigError(f"--attention-backend te: {NO_TRANSFORMER_ENGINE}")
    model = PolicyModel(
        config,
        _block_spec(config, backend),
        arch,
        groups,
        vocab_size=padded_vocab_size(arch.vocab_size, make_vocab_size_divisible_by, groups.tp_size),
        chunk_size=chunk_size,
    )
    model.to(current_device())
    return model


def _block_spec(config: TransformerConfig, attention_backend: str) -> TransformerBlockSubmodules:
    """Megatron's own layer spec with our attention inside, and norms that allow sequence parallelism."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, final_norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, final_norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
    core_attention = ModuleSpec(module=PackedAttention, params={"backend": attention_backend})
    layer.submodules.self_attention.submodules.core_attention = core_attention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=final_norm)
