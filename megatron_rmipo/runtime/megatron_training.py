"""Megatron-LM's training program (``megatron.training``) on a machine without CUDA.

Beyond what :mod:`megatron_rmipo.runtime.cpu` answers for Megatron-Core. Only where CUDA is absent, and only if it is called.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from megatron_rmipo.runtime.cpu import install_cpu_runtime

_installed = False


def install_cpu_training() -> bool:
    """Let ``megatron.training.pretrain`` run on the CPU of this process, over gloo. Idempotent; before arguments are parsed.

    Returns:
        True where it does so now, False where CUDA is present and nothing was touched.
    """
    global _installed
    if not install_cpu_runtime():
        return False
    if _installed:
        return True
    parts = ("arguments", "initialize", "training")
    arguments, initialize, training = (_module(f"megatron.training.{name}") for name in parts)
    # At TP > 1 the generation of the device is asked for, and then an environment in which communication overlaps.
    arguments.get_device_arch_version = lambda: 9
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    training.initialize_megatron = _without_asking_for_cuda(training.initialize_megatron)
    # Fused kernels would be warmed up on the device, and those of experts ask for one when they are compiled.
    training.set_jit_fusion_options = lambda *args, **kwargs: None
    _module("torch._dynamo.config").disable = True
    # It runs make for helpers of Megatron's own data sets; its wheel has them compiled, and no Makefile.
    initialize._compile_dependencies = lambda: None
    norm: Any = _module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    norm.__new__ = _with_sequence_parallelism(norm.__new__)
    _installed = True
    return True


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _without_asking_for_cuda(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """Process groups and random states, too, are made only where a device is counted."""

    @functools.wraps(initialize)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("torch.cuda.device_count", return_value=1):
            return initialize(*args, **{**kwargs, "allow_no_cuda": True})

    return call


def _with_sequence_parallelism(new: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around torch's norm, which refuses it; its weight marked for the sum over tensor-parallel ranks."""

    def call(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(config, "sequence_parallel", False):
            norm = new(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return call
