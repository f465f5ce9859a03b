"""NVIDIA's Megatron-Bridge on a machine without CUDA: what it imports and cannot be had here, and settings without kernels.

Transformer Engine, nvidia-resiliency-ext and megatron-energon are asked for at import by parts of the package that stay unused
here. Each is an empty module while the package is imported, and absent again afterwards: nobody takes it for the real one.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rmipo.model.layers.norms import RMSNorm

ABSENT = ("transformer_engine", "nvidia_resiliency_ext", "megatron.energon")


def bridge_is_installed() -> bool:
    """Whether the package itself is there."""
    return importlib.util.find_spec("megatron.bridge") is not None


def local_layer_spec(provider: Any) -> TransformerBlockSubmodules:
    """Layers without Transformer Engine: what a provider's ``transformer_layer_spec`` gives."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(provider), layer_norm=RMSNorm)


# Fields of a model's provider, for a machine without CUDA.
WITHOUT_KERNELS: dict[str, Any] = {
    "transformer_layer_spec": local_layer_spec,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "batch_p2p_comm": False,
}


class _Anything(type):
    """A class that has whatever is asked of it."""

    def __getitem__(cls, item: Any) -> _Anything:
        return cls

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _AnyModule(ModuleType):
    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name.startswith(ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AnyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _absent_ones() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.startswith(ABSENT)]:
            del sys.modules[name]


def import_bridge() -> None:
    """Import the package and its training loop in this process."""
    # These look for Transformer Engine at import: first, so that they do not find it.
    for name in ("megatron.core.extensions.transformer_engine", "megatron.training.models", "megatron.core.inference.engines"):
        importlib.import_module(name)
    importlib.import_module("modelopt.torch.distill.plugins.megatron")
    with _absent_ones():
        importlib.import_module("megatron.bridge.training.finetune")
    _allow_no_cuda()


def _allow_no_cuda() -> None:
    """What ``finetune`` would do on a GPU alone, beside what :mod:`megatron_rmipo.runtime.cpu` answers."""
    setup: Any = importlib.import_module("megatron.bridge.training.setup")
    initialize: Any = importlib.import_module("megatron.bridge.training.initialize")
    begin = setup.initialize_megatron

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        # It seeds Megatron's trackers, and makes process groups, where there is a device.
        with mock.patch("torch.cuda.device_count", return_value=1):
            return begin(*args, **kwargs, allow_no_cuda=True)

    setup.initialize_megatron = initialize_megatron
    # The wheel of megatron-core has no Makefile; pairs need no index of samples.
    initialize.compile_helpers = lambda: None
    initialize._warmup_jit_function = lambda *args: None
    # Without Transformer Engine Megatron has no such classes, which the package takes for there being some.
    vars(importlib.import_module("megatron.bridge.peft.utils"))["HAVE_TE"] = False
