"""A run's optimizer and learning-rate schedule, as Megatron-Core builds them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.schema import Config, OptimizerConfig
from megatron_rmipo.optimizer.stand_in import transformer_engine_adam
from megatron_rmipo.runtime.groups import ProcessGroups

# As Megatron-LM reads its flags; fp8 is stored as bytes.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: Config, groups: ProcessGroups) -> MegatronOptimizer:
    """The optimizer of this rank's wrapped part of a model. All ranks call it together, after the weights are loaded."""
    precise = config.memory.use_precision_aware_optimizer
    with transformer_engine_adam() if precise and not torch.cuda.is_available() else contextlib.nullcontext():
        settings = _settings(config)
        overrides = get_standard_config_overrides(settings)
        if (ratio := config.lora.lora_plus_ratio) is not None:
            # LoRA+ (arXiv:2402.12354); the schedule goes from and to as many times the rates of the others.
            rates = {"max_lr": ratio * settings.lr, "min_lr": ratio * settings.min_lr}
            # By such marks alone are the groups of a checkpoint told apart.
            overrides[ParamKey(attr="is_adapter_output")] = {**rates, "is_decoupled_lr": True}
        optimizer: MegatronOptimizer = get_megatron_optimizer(
            settings,
            list(chunks),
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=groups.megatron_collection(),
        )
    _count_experts_once(optimizer, groups)
    return optimizer


def _count_experts_once(optimizer: MegatronOptimizer, groups: ProcessGroups) -> None:
    """Have the norm count what each rank of an expert holds whole by the expert's ranks: Megatron goes by other layers'."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if any(group["is_expert_parallel"] for group in part.param_groups):
            part.tp_group = groups.expert_tp


def _settings(config: Config) -> MegatronOptimizerConfig:
    optimizer, memory, bf16 = config.optimizer, config.memory, config.model.bf16
    return MegatronOptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **_memory_settings(memory),
    )


def _memory_settings(memory: MemoryConfig) -> dict[str, Any]:
    if not memory.use_precision_aware_optimizer:
        return {}
    dtypes = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return {
        "use_precision_aware_optimizer": True,
        **{name: DTYPES[getattr(memory, name)] for name in dtypes},
        "optimizer_cpu_offload": memory.optimizer_cpu_offload,
        "optimizer_offload_fraction": memory.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": memory.overlap_cpu_optimizer_d2h_h2d,
    }


def build_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, train_iters: int) -> OptimizerParamScheduler:
    """Megatron's learning-rate schedule, counted in optimizer steps."""
    warmup = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = round(config.lr_warmup_fraction * train_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(warmup, train_iters - 1),
        lr_decay_steps=train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # A resumed run goes on with this run's schedule; the checkpoint gives only how far it is.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
