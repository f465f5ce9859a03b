"""The flags that trade time, digits or host memory for a rank's memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_rmipo.config.options import described, option

RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]
OffloadModule = Literal["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory: what is computed anew, kept in fewer digits, or on the host."""

    recompute_modules: list[RecomputeModule] | None = dataclasses.field(
        default=None,
        metadata=described(
            "With selective recomputation: what is computed anew, of core_attn, layernorm (those before attention and MLP), mlp "
            "(of dense layers), moe (all of a layer of experts), moe_act and shared_experts (parts of that), mla_up_proj (of "
            "latent attention); unset: core_attn.",
            "MODULE",
        ),
    )
    fine_grained_activation_offloading: bool = option(
        False, "Keep the inputs of --offload-modules on the host until the backward pass. Needs Transformer Engine's layers."
    )
    offload_modules: list[OffloadModule] | None = dataclasses.field(
        default=None,
        metadata=described(
            "With --fine-grained-activation-offloading: whose inputs, of attn_norm, qkv_linear, core_attn, attn_proj, mlp_norm, "
            "expert_fc1, moe_act.",
            "MODULE",
        ),
    )
    min_offloaded_tensor_size: int = option(
        1024 * 1024, "With --fine-grained-activation-offloading: tensors of fewer numbers stay on the device."
    )
    use_precision_aware_optimizer: bool = option(
        False,
        "Keep gradients and the optimizer's state in the dtypes below, and of fp32 weights only what bf16 weights lack of them. "
        "Needs --bf16, --use-distributed-optimizer and, on a GPU, Transformer Engine.",
    )
    main_grads_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "With --use-precision-aware-optimizer: what gradients are summed, reduced and read in."
    )
    main_params_dtype: Literal["fp32", "fp16"] = option(
        "fp32", "With --use-precision-aware-optimizer: the optimizer's own weights; fp16 with a scale a tensor."
    )
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = option(
        "fp32", "With --use-precision-aware-optimizer: Adam's running mean of gradients; fp16 and fp8 with a scale a tensor."
    )
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = option(
        "fp32", "With --use-precision-aware-optimizer: Adam's running mean of squared gradients."
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep the optimizer's state and fp32 weights on the host, and update there. Needs CUDA and "
        "--use-precision-aware-optimizer.",
    )
    optimizer_offload_fraction: float = option(1.0, "With --optimizer-cpu-offload: the share of weights, from the first on.")
    overlap_cpu_optimizer_d2h_h2d: bool = option(
        False, "With --optimizer-cpu-offload: copy gradients and weights while other weights are updated."
    )
