"""Which adapter a model computes with: the one that is trained, another, or none, which makes it the model that it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module, Parameter

from megatron_rmipo.model.lora.bridge import bridge_adapters_off, has_bridge_adapters
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped


class Switch:
    """What all adapted layers of a chunk go by.

    Attributes:
        active: name of the adapter that is computed with; None for none.
    """

    def __init__(self) -> None:
        self.active: str | None = ADAPTER
        # Parameters trained whole -> what they are where another adapter is active, by its name, or none.
        self._versions: dict[Parameter, dict[str | None, Tensor]] = {}
        self._trained: dict[Parameter, Tensor] = {}

    def keep(self, parameter: Parameter, active: str | None, value: Tensor) -> None:
        """Have a parameter be ``value``, of its shape, whenever ``active`` is."""
        self._versions.setdefault(parameter, {})[active] = value

    def turn(self, active: str | None) -> None:
        """Compute with another adapter from now on, or with none."""
        for parameter, versions in self._versions.items():
            if self.active == ADAPTER:
                # The memory that gradients and the optimizer belong to comes back.
                self._trained[parameter] = parameter.data
            parameter.data = self._trained.pop(parameter) if active == ADAPTER else versions.get(active, versions[None])
        self.active = active


def is_adapted(model: Chunks) -> bool:
    """Whether a model, wrapped or not, has adapters."""
    return any(isinstance(getattr(unwrapped(chunk), "adapter_switch", None), Switch) for chunk in chunks_of(model))


def switch_of(chunk: Module) -> Switch:
    """The switch of a chunk, wrapped or not, made where there is none."""
    inner: Any = unwrapped(chunk)
    if not isinstance(getattr(inner, "adapter_switch", None), Switch):
        inner.adapter_switch = Switch()
    switch: Switch = inner.adapter_switch
    return switch


@contextlib.contextmanager
def computing_with(model: Chunks, active: str | None) -> Iterator[None]:
    """While it is entered, all chunks of this rank compute with another adapter. No communication, but all ranks do it together.

    Args:
        model: this rank's part of an adapted model, or its chunks.
        active: name of the adapter; None for none: the model without one, those of Megatron-Bridge off, too.

    Raises:
        ConfigError: as of :func:`megatron_rmipo.model.lora.bridge.bridge_adapters_off`.
    """
    switches = [switch_of(chunk) for chunk in chunks_of(model)] if is_adapted(model) else []
    before = [switch.active for switch in switches]
    with contextlib.ExitStack() as stack:
        if active is None and has_bridge_adapters(model):
            stack.enter_context(bridge_adapters_off(model))
        for switch in switches:
            switch.turn(active)
        try:
            yield
        finally:
            for switch, one in zip(switches, before, strict=True):
                switch.turn(one)


class AdapterView(NamedTuple):
    """A model as it is with another adapter than the trained one.

    Attributes:
        model: this rank's part, wrapped or not, or its chunks.
        active: name of the adapter; None for none.
    """

    model: Chunks
    active: str | None


@contextlib.contextmanager
def viewed(reference: Chunks | AdapterView) -> Iterator[Chunks]:
    """A model, or while it is entered one as it is with another adapter."""
    if not isinstance(reference, AdapterView):
        yield reference
        return
    with computing_with(reference.model, reference.active):
        yield reference.model
