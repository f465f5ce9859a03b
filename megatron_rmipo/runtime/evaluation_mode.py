"""Models in evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch.nn import Module


@contextlib.contextmanager
def evaluating(model: Module | Sequence[Module]) -> Iterator[bool]:
    """A model, or its chunks, in evaluation mode, so that nothing is dropped out or recomputed; whether it was in training mode.

    Afterwards each of its modules is in the mode that it was in, whatever that of the whole.
    """
    chunks = [model] if isinstance(model, Module) else model
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    for chunk in chunks:
        chunk.eval()
    try:
        yield modes[0][1]
    finally:
        for module, trains in modes:
            module.training = trains
