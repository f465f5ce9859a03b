"""A model with its adapters off, which is the reference of the one with them: ours, or those that Megatron-Bridge put in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.lora.bridge import has_bridge_adapters
from megatron_rmipo.model.lora.switch import computing_with, is_adapted
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped


def has_adapters(model: Chunks) -> bool:
    """Whether this rank's part of a model, wrapped or not, has adapters. No communication."""
    return is_adapted(model) or has_bridge_adapters(model)


@contextlib.contextmanager
def adapters_off(model: Chunks) -> Iterator[None]:
    """While it is entered, a model is the one that it was before it got adapters. No communication, but all ranks enter together.

    ::

        with adapters_off(model):
            reference = score(model, rows, tokens_per_microbatch=8192)

    Args:
        model: this rank's part of a model with adapters, wrapped or not; of an interleaved pipeline the list of its chunks.

    Raises:
        ConfigError: it has none, or Megatron-Bridge's and parameters that are trained beside them.
    """
    if not has_adapters(model):
        kind = type(unwrapped(chunks_of(model)[0])).__name__
        raise ConfigError(f"this {kind} has no adapters that could be off; with them off it would be what it is.")
    with computing_with(model, None):
        yield


def is_same_model(one: Chunks, other: Chunks) -> bool:
    """Whether two models, wrapped or not, have chunks in common."""
    others = {id(unwrapped(chunk)) for chunk in chunks_of(other)}
    return any(id(unwrapped(chunk)) in others for chunk in chunks_of(one))
