"""The flags that trade time, digits or host memory for a rank's memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_rmipo.config.options import described, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory: what is computed anew, kept in fewer digits, or on the host."""

    recompute_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata=described("With selective recomputation: what is computed anew; unset: core_attn.", "MODULE"),
    )
    fine_grained_activation_offloading: bool = option(
        False, "Keep what --offload-modules save for the backward pass on the host."
    )
    offload_modules: list[str] | None = dataclasses.field(
        default=None, metadata=described("With --fine-grained-activation-offloading: whose activations.", "MODULE")
    )
    use_precision_aware_optimizer: bool = option(
        False, "The optimizer keeps its state in the dtypes below. Needs --use-distributed-optimizer."
    )
    main_grads_dtype: Literal["fp32", "bf16"] = option("fp32", "Gradients that the optimizer reads.")
    main_params_dtype: Literal["fp32", "fp16"] = option("fp32", "The optimizer's own weights.")
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = option("fp32", "The gradient's running mean.")
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = option("fp32", "The squared gradient's running mean.")
    optimizer_cpu_offload: bool = option(False, "Keep the optimizer's state on the host and update there.")
    optimizer_offload_fraction: float = option(1.0, "With --optimizer-cpu-offload: which share of it.")
    use_torch_optimizer_for_cpu_offload: bool = option(False, "With --optimizer-cpu-offload: torch's AdamW on the host.")
    overlap_cpu_optimizer_d2h_h2d: bool = option(False, "With --optimizer-cpu-offload: copy while updates run.")
