"""Adapters that Megatron-Bridge put into a model: which those are, switched off, and made to take rows of any length.

Written against ``megatron/bridge/peft`` 0.6.2, which is not needed here: its wrappers of linear layers are known by the
switch that each has (``_adapter_enabled``).

Shape letters: T tokens of the row, q, k channels of this rank's query and key heads, G its key/value groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.packed_model import Chunks, Replacement, chunks_of, unwrapped

# Where Megatron-Bridge sets a block's forward in the object: recomputed, it has a gradient only if its input has.
_RECOMPUTE = "megatron.bridge.peft.recompute"


def bridge_adapters(model: Chunks) -> Iterator[tuple[str, Any]]:
    """Name and module of all that Megatron-Bridge gave an adapter, of this rank's part of a model, wrapped or not."""
    for chunk in chunks_of(model):
        for name, module in unwrapped(chunk).named_modules():
            if isinstance(getattr(module, "_adapter_enabled", None), bool):
                yield name, module


def has_bridge_adapters(model: Chunks) -> bool:
    """Whether Megatron-Bridge gave this rank's part of a model adapters. No communication."""
    return next(bridge_adapters(model), None) is not None


@contextlib.contextmanager
def bridge_adapters_off(model: Chunks) -> Iterator[None]:
    """While it is entered, a model computes without the adapters of Megatron-Bridge: what it was before it got them.

    No communication, but all ranks do it together. Afterwards each is on or off as it was.

    Args:
        model: this rank's part, wrapped or not, or its chunks.

    Raises:
        ConfigError: other parameters are trained, too, so that the model without adapters is not what it was.
    """
    wrapped = list(bridge_adapters(model))
    _refuse_trained_base(model, [name for name, _ in wrapped])
    before = [(module, module._adapter_enabled) for _, module in wrapped]
    for module, _ in before:
        module._adapter_enabled = False
    try:
        yield
    finally:
        for module, enabled in before:
            module._adapter_enabled = enabled


def bridge_adapter_problems(model: Module) -> Iterator[str]:
    """What of the adapters keeps a chunk, not wrapped, from being scored exactly, a line each with the reason."""
    for name, module in bridge_adapters(model):
        if hasattr(module, "_interleave_qkv"):
            yield from _split_problems(name, module)
        if hasattr(getattr(module, "adapter", None), "weight_magnitude"):
            yield from _length_problems(name, module)


def _split_problems(name: str, module: Any) -> Iterator[str]:
    kind, config = type(module).__name__, module.to_wrap.config
    missing = [part for part in ("adapter_q", "adapter_k", "adapter_v") if module.adapter[part] is None]
    if missing:
        yield f"{name}: {', '.join(missing)} is missing, which a {kind} calls; target linear_q, linear_k and linear_v"
    groups, tp_size = config.num_query_groups, config.tensor_model_parallel_size
    if groups < tp_size:
        yield f"{name}: {groups} key/value heads over {tp_size} ranks share some, and the adapters of a {kind} do not"


def _length_problems(name: str, module: Any) -> Iterator[str]:
    tp_size = module.to_wrap.config.tensor_model_parallel_size
    if module.adapter.input_is_parallel and tp_size > 1:
        yield (
            f"{name}: the columns of its weight are cut over {tp_size} ranks, and a {type(module).__name__} takes the lengths of "
            "rows from each rank's own, so that ranks compute different things; TP 1, or LoRA without lengths"
        )


def take_any_row(model: Module) -> None:
    """Let the adapters of a chunk, not wrapped, take rows of any length, which split ones do not at TP > 1."""
    for _, module in bridge_adapters(model):
        if hasattr(module, "_interleave_qkv"):
            InOrderOfGroups(module)


def is_recompute_hook(forward: Any) -> bool:
    """Whether this is Megatron-Bridge's ``forward`` of a block, which computes what the one behind it does."""
    return getattr(forward, "__globals__", {}).get("__name__") == _RECOMPUTE


class InOrderOfGroups(Replacement):
    """How split adapters of queries, keys and values stand in a rank's fused output: per key/value group, as Megatron has them.

    Megatron-Bridge counts the heads of all ranks, and so puts tokens together, as many as there are ranks.

    Args:
        module: its wrapper of ``linear_qkv``.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module, "_interleave_qkv")
        self.head_size = int(module.to_wrap.config.kv_channels)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[T, .., q + 2 k]`` of ``[T, .., q]``, ``[T, .., k]`` and ``[T, .., k]``."""
        groups = key.shape[-1] // self.head_size
        parts = [part.reshape(*part.shape[:-1], groups, -1) for part in (query, key, value)]
        return torch.cat(parts, dim=-1).flatten(-2)


def _refuse_trained_base(model: Chunks, wrapped: list[str]) -> None:
    """Refuse a model that is trained beside its adapters."""
    names = tuple(f"{name}." for name in wrapped)
    for chunk in chunks_of(model):
        for name, parameter in unwrapped(chunk).named_parameters():
            own = name.startswith(names) and ".to_wrap." not in name
            if parameter.requires_grad and not own:
                raise ConfigError(
                    f"{name} is trained beside the adapters, so that the model with its adapters off is not the one before "
                    "training, and no reference. Freeze it, or compare with another model's log-probs."
                )
