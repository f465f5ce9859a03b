"""Pickles inside checkpoints, read without letting them build or call whatever they name.

torch and Megatron-Core unpickle in several places: ``.metadata`` with ``pickle.load``, objects in ``.distcp`` files with
``torch.load(weights_only=False)``, Transformer Engine's extra state with ``pickle.loads``. All of them look up
``pickle.load``, ``pickle.loads`` or ``pickle.Unpickler`` when they are called, so that is where they are met.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch

# Plain values, tensors, NumPy arrays, and the arguments that Megatron-LM keeps. None of these runs anything that a pickle names.
_BUILTINS = ("set", "frozenset", "bytearray", "complex", "slice", "range")
_NAMES = {
    # Under the name of Python 2, too, which torch's protocol writes.
    *((module, name) for module in ("builtins", "__builtin__") for name in _BUILTINS),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("_codecs", "encode"),
    ("_io", "BytesIO"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("signal", "Signals"),
}
# Rooms whose records may be built: dataclasses, enumerations and tuples. Not their other classes, which may open files.
_ROOMS = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.", "transformer_engine.common.recipe")
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        found = None
        if (module, name) in _NAMES:
            found = super().find_class(module, name)
        elif "." not in name and (module == "torch" or module.startswith((*_ROOMS, "pathlib"))):
            candidate = super().find_class(module, name)
            if _is_plain(candidate, module):
                found = candidate
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a checkpoint may hold")
        return found


def _is_plain(candidate: Any, module: str) -> bool:
    if isinstance(candidate, _CONSTANTS):
        return True
    if not isinstance(candidate, type):
        return False
    if issubclass(candidate, pathlib.PurePath):
        return True
    # A name that the module has merely imported is not its own.
    own = candidate.__module__ == module and module.startswith(_ROOMS)
    return own and (dataclasses.is_dataclass(candidate) or issubclass(candidate, enum.Enum | tuple))


def _load(stream: Any, /, **options: Any) -> Any:
    return _RestrictedUnpickler(stream, **options).load()


def _loads(data: Any, /, **options: Any) -> Any:
    return _load(io.BytesIO(data), **options)


_RESTRICTED = {"load": _load, "loads": _loads, "Unpickler": _RestrictedUnpickler}


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Within it, pickles hold plain values, tensors, and records of torch.distributed.checkpoint and Megatron-Core alone.

    It holds for the whole process: do nothing within it but load a checkpoint. torch's collectives have their own names for
    the unpickler and are not touched.

    Raises:
        pickle.UnpicklingError: out of the load, where a pickle names anything else; it was not called.
    """
    originals = {name: getattr(pickle, name) for name in _RESTRICTED}
    for name, restricted in _RESTRICTED.items():
        setattr(pickle, name, restricted)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(pickle, name, original)
