"""A second device that computes nothing, so that a machine without a GPU can see where a host would wait for one.

Tensors are torch's fake ones: shapes, dtypes and devices as on a GPU, no data. Mixing devices raises as it would there. Counted
is what would make the host wait: reading a number, indices by a mask, copies to the host, and from memory of the host that is not
pinned. Numbers that are read are 1. Once a process pretends, it cannot stop: use one of its own.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron_rmipo.model.attention.packed import PackedAttention
from megatron_rmipo.model.weight_gradient import WeightGrad
from megatron_rmipo.runtime import cpu, groups

NAME = "pretend"
aten = torch.ops.aten


def pretend() -> FakeTensorMode:
    """From here on this process computes on the pretended device, where tensors are made under the mode that is returned."""
    _setup_privateuseone_for_python_backend(NAME)
    # So that torch.tensor(..., device=...) is made on the CPU and copied, as it is for CUDA.
    torch._C._set_only_lift_cpu_tensors(True)
    device = torch.device(NAME, 0)
    cpu_module: Any = cpu
    cpu_module._CPU = device
    cpu_module._cuda_type_name = lambda name: "torch.cuda." + name.rpartition(".")[2]
    here = groups.current_device
    for module in list(sys.modules.values()):
        if getattr(module, "current_device", None) is here:
            module.current_device = lambda: device  # type: ignore[attr-defined]
    _stub_what_needs_data()
    return FakeTensorMode(allow_non_fake_inputs=True)


def _stub_what_needs_data() -> None:
    # One rank: what collectives give is what they got.
    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, lambda *args, **kwargs: None)
    dist.all_gather_object = lambda gathered, one, **kwargs: gathered.__setitem__(0, one)  # type: ignore[assignment]
    # The kernels of attention know no such device; what it waits for is tested elsewhere.
    PackedAttention.forward = lambda self, query, key, value, *args, **kwargs: query.flatten(2) + key.sum() + value.sum()  # type: ignore[method-assign]
    # Nor does it know sparse tensors: an empty one, which autograd is given for a weight, is a whole one here.
    WeightGrad.for_autograd = lambda self: _like(self._weight)  # type: ignore[method-assign]
    # Megatron's own, without Transformer Engine or apex, reads the norm of each parameter by itself.
    clip_grads.l2_norm_impl = lambda chunk, flag, lists, per_parameter: (_norm(lists[0]), None)


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def move(model: Any) -> Any:
    """A model of the CPU with parameters on the pretended device; under the mode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            moved = torch.nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
            moved.__dict__.update(parameter.__dict__)
            module._parameters[name] = moved
    for chunk in model:
        chunk.rotary_pos_emb.inv_freq = _like(chunk.rotary_pos_emb.inv_freq)
    return model


def _like(tensor: torch.Tensor, device: str = NAME) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, by kind and by the line of ours or Megatron's: ``item megatron/core/...:99``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            self._note("item", _is_there(args[0]))
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.is_pinned.default:
            return hasattr(args[0], "is_pinned_here")
        if func is aten._pin_memory.default:
            pinned = _like(args[0], "cpu")
            pinned.is_pinned_here = True  # type: ignore[attr-defined]
            return pinned
        if func is aten._to_copy.default:
            return self._copy(func, args[0], kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            return func(args[0], self._indices(args[0], args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _copy(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        target = torch.device(kwargs.get("device") or source.device)
        if target.type == source.device.type:
            result: torch.Tensor = func(source, **kwargs)
            return result
        self._note("copy to the host", _is_there(source))
        follows = hasattr(source, "is_pinned_here") and kwargs.get("non_blocking", False)
        self._note("copy from the host", not _is_there(source) and not follows)
        return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)

    def _indices(self, tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Indices whose shapes are known: a mask as if it were true everywhere."""
        whole: list[torch.Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            self._note("index by a mask", is_mask and _is_there(tensor))
            self._note("index from the host", index is not None and _is_there(tensor) and not _is_there(index))
            whole.append(
                torch.zeros(index.numel(), dtype=torch.int64, device=index.device) if index is not None and is_mask else index
            )
        return whole

    def _note(self, kind: str, waits: bool) -> None:
        if waits:
            frames = [frame for frame in traceback.extract_stack() if "/megatron" in frame.filename]
            ours = [frame for frame in frames if Path(frame.filename).name != "cpu.py"]
            place = ours[-1].filename.rpartition("/megatron")[2] if ours else "?"
            self.found[f"{kind} megatron{place}:{ours[-1].name if ours else ''}"] += 1


def _is_there(tensor: torch.Tensor) -> bool:
    return tensor.device.type == NAME
