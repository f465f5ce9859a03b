"""Activations kept on the host until the backward pass, by Megatron-Core, of rows whose number and lengths vary.

Megatron-Core learns in the first step which tensors of which micro-batch go, expects the same micro-batches in all further steps,
and keeps a host tensor of every shape that it met. Here each gradient pass begins anew, each row by itself, and host memory goes
back to torch, which keeps what is pinned for the next of about that size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast, get_args

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.config.flags.memory import OffloadModule
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.transformer_engine import transformer_engine_layers

# megatron-core 0.19 changed it; there a test saw that nothing of a norm's input came to the host.
IS_ANOTHER = "pp_rank" in inspect.signature(PipelineOffloadManager.init_model_chunk_offload_handler).parameters


class _HostTensors:
    """Stands where Megatron-Core keeps host tensors of each shape for later."""

    def allocate(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """A tensor of the host, pinned."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def free(self, tensor: Tensor) -> None:
        """It goes with its last reference."""

    def reset(self) -> None:
        """Nothing is kept."""


def offload_by_row(model: Module) -> None:
    """Have a model that was built to offload do so row by row; one that was not stays as it is."""
    config: Any = model.config
    model.offloads_activations = config.fine_grained_activation_offloading
    # The layers know by now; the schedules, which would learn from the step, are not to know.
    config.fine_grained_activation_offloading = False
    if model.offloads_activations:
        PipelineOffloadManager.get_instance()._cpu_tensor_pool = _HostTensors()
        for parameter in model.parameters():
            # Linear layers keep their weights for the backward pass, too.
            parameter.offloading_activation = False  # type: ignore[attr-defined]


def begin_gradient_pass(model: Module) -> None:
    """Forget the rows of the gradient pass before, where a model, not wrapped, offloads activations."""
    if getattr(model, "offloads_activations", False):
        manager = PipelineOffloadManager.get_instance()
        manager._stages = None
        for rows in (manager._queue, manager._cached_chunks_forward, manager._cached_chunks_backward):
            rows.clear()
        manager.reset()


def begin_row(model: Module) -> None:
    """Offload what the next row saves, where a model, not wrapped, does so, and a backward pass will ask for it."""
    if not getattr(model, "offloads_activations", False):
        return
    manager, config = PipelineOffloadManager.get_instance(), cast(TransformerConfig, model.config)
    if model.training and torch.is_grad_enabled():
        manager.init_model_chunk_offload_handler(
            vp_size=config.virtual_pipeline_model_parallel_size,
            vp_stage=getattr(model, "vp_stage", None),
            min_offloaded_tensor_size=config.min_offloaded_tensor_size,
        )
    else:
        manager._cur_forward_chunk = None


def offload_module_problems(config: Config, arch: ModelArchitecture) -> Iterator[str]:
    """Modules of --offload-modules whose inputs nobody keeps, of which Megatron would say nothing."""
    if config.memory.fine_grained_activation_offloading and IS_ANOTHER:
        yield "--fine-grained-activation-offloading is for megatron-core 0.16 so far; leave it out with this version"
    absent = dict(_absent(config, arch))
    works = [name for name in get_args(OffloadModule) if name not in absent]
    for name in config.memory.offload_modules or []:
        if name in absent:
            yield f"--offload-modules {name}: {absent[name]}; would work: {' '.join(works)}"


def _absent(config: Config, arch: ModelArchitecture) -> Iterator[tuple[str, str]]:
    recomputed, in_linear_layers = config.memory.recompute_modules or ["core_attn"], transformer_engine_layers(config.model)
    for name, is_apart in (("attn_norm", arch.latent is not None), ("mlp_norm", arch.experts is not None)):
        if not arch.pre_norm:
            yield name, "this model has no norms before attention and MLP"
        elif in_linear_layers and not is_apart:
            yield name, "it is part of the linear layer that follows"
    for name in ("expert_fc1", "moe_act"):
        if arch.experts is None or not config.experts.moe_grouped_gemm:
            yield name, "this model has no experts" if arch.experts is None else "needs --moe-grouped-gemm"
    if config.model.recompute_granularity == "selective":
        for module, parts in (("core_attn", ["core_attn"]), ("moe", ["expert_fc1", "moe_act"])):
            if module in recomputed:
                yield from ((part, f"--recompute-modules {module} computes it anew") for part in parts)
