"""Megatron-Core on a machine without CUDA.

Megatron-Core asks ``torch.cuda`` for the current device, for streams and for random states, and writes ``device="cuda"`` in its
schedules and optimizers. :func:`install_cpu_runtime` answers those questions with the CPU. It is the only place that patches
torch, does so only where CUDA is absent, and leaves a machine with CUDA untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False

# Literal device="cuda" reaches these factories inside Megatron-Core; nothing else needs rewriting.
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like", "ones_like")
)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` to the CPU, and drops ``pin_memory``, in calls of tensor factories and ``Tensor.to``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _cuda_type_name(func(*args))
        if kwargs and ("device" in kwargs or "pin_memory" in kwargs) and (func in _FACTORIES or func is torch.Tensor.to):
            kwargs = dict(kwargs)
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return func(*args, **(kwargs or {}))


def _cuda_type_name(type_name: str) -> str:
    # The optimizers compare Tensor.type() with "torch.cuda.FloatTensor" and its like.
    return type_name.replace("torch.", "torch.cuda.", 1) if not type_name.startswith("torch.cuda.") else type_name


class _InertStream:
    """Stands where a CUDA stream, event or device context would; the CPU has one queue, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _inert_function()

    def record_event(self, event: Any = None) -> _InertStream:
        """An event that has happened."""
        return _InertStream()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def _inert_function() -> Callable[..., None]:
    # A new one each time: torch.compile keeps a table of torch.cuda's functions and refuses one that stands in it twice.
    return lambda *args, **kwargs: None


def install_cpu_runtime() -> bool:
    """Make Megatron-Core run on the CPU of this process. Idempotent.

    Returns:
        True where the shims are in place, False where CUDA is present and nothing was touched.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache", "set_device", "_lazy_init", "reset_peak_memory_stats", "nvtx_range_pop"):
        setattr(cuda, name, _inert_function())
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _inert_function()
    # A context of a stream may be entered again, which one of contextlib's may not.
    for name in ("Stream", "Event", "stream"):
        setattr(cuda, name, _InertStream)
    cuda.current_stream = lambda *args, **kwargs: _InertStream()
    cuda.default_stream = lambda *args, **kwargs: _InertStream()
    cuda.device = _InertStream
    cuda._lazy_call = lambda call, **kwargs: call()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.default_generators = (torch.default_generator,)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    module_class: Any = torch.nn.Module
    module_class.cuda = lambda self, *args, **kwargs: self
    _patch_megatron_random()
    _patch_megatron_dispatcher()
    _patch_megatron_uneven_collectives()
    # Entered once for the life of the process: Megatron-Core creates its tensors from many places.
    mode: Any = _CudaMeansCpu()
    mode.__enter__()
    _installed = True
    return True


def _patch_megatron_random() -> None:
    # These were bound at import from torch.cuda internals that need a driver.
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random

    @functools.wraps(module._get_cuda_rng_state)
    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    @functools.wraps(module._set_cuda_rng_state)
    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state


def _patch_megatron_dispatcher() -> None:
    # Of a tensor that never was on a GPU it leaves out the second half of its work.
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    module: Any = token_dispatcher
    module.maybe_move_tensor_to_cpu = to_cpu


def _patch_megatron_uneven_collectives() -> None:
    # gloo gathers and scatters equal parts alone; tensor-parallel ranks of experts hold as many tokens as happen to go there.
    from megatron.core.tensor_parallel import mappings

    module: Any = mappings
    gather_even, scatter_even = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    @functools.wraps(gather_even)
    def gather(part: Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            gathered: Tensor = gather_even(part, group, None, use_global_buffer)
            return gathered
        longest = max(output_split_sizes)
        padded = torch.cat([part, part.new_zeros(longest - part.shape[0], *part.shape[1:])])
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([one[:size] for one, size in zip(parts, output_split_sizes, strict=True)])

    @functools.wraps(scatter_even)
    def scatter(whole: Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            scattered: Tensor = scatter_even(whole, group, None, use_global_buffer)
            return scattered
        total = whole.clone()
        dist.all_reduce(total, group=group)
        parts: Any = torch.split(total, input_split_sizes)
        own: Tensor = parts[group.rank()].clone()
        return own

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather, scatter
