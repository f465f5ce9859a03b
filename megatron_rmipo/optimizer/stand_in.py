"""Megatron-Core's precision-aware optimizer without CUDA, where there is no Transformer Engine."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import optimizer_config

from megatron_rmipo.optimizer.precise_adam import PrecisionAwareAdam

_MODULES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")


@contextlib.contextmanager
def transformer_engine_adam() -> Iterator[None]:
    """While an optimizer is configured and built, Megatron-Core finds our Adam as Transformer Engine's, of a version it takes."""
    package: Any = megatron_optimizer
    modules = {name: types.ModuleType(name) for name in _MODULES}
    modules[_MODULES[-1]].FusedAdam = PrecisionAwareAdam  # type: ignore[attr-defined]
    new_enough = lambda version, check_equality=True: True  # noqa: E731
    replaced = [
        (package, "Adam", PrecisionAwareAdam),
        (package, "USING_PYTORCH_OPTIMIZER", False),
        (package, "is_te_min_version", new_enough),
        (optimizer_config, "is_te_min_version", new_enough),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)
        for name in modules:
            del sys.modules[name]
