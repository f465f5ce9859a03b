"""A stand-in for the adapters of Megatron-Bridge 0.6.2: its wrappers' parts, switch and names, over Megatron's linear layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Dropout, Identity, Module, ModuleDict, Parameter, init

Kind = Literal["LoRA", "CanonicalLoRA", "DoRA"]


class LowRankPair(Module):
    """``ParallelLinearAdapter``: A cut along its rank beside a column-parallel layer, B along its rows beside any."""

    def __init__(self, base: Any, num_rows: int, dim: int, alpha: float, dropout: float) -> None:
        super().__init__()
        config, self.input_is_parallel = base.config, isinstance(base, RowParallelLinear)
        self.dim, self.alpha, self.sequence_parallel, self.group = dim, alpha, config.sequence_parallel, base.tp_group
        config.sequence_parallel = False
        common: dict[str, Any] = {"config": config, "bias": False, "tp_group": base.tp_group}
        if self.input_is_parallel:
            further = {"input_is_parallel": True, "skip_bias_add": True, "init_method": init.xavier_normal_}
            self.linear_in: Any = RowParallelLinear(base.input_size, dim, **further, **common)
        else:
            further = {"gather_output": True, "init_method": init.xavier_normal_, "disable_grad_reduce": self.sequence_parallel}
            self.linear_in = ColumnParallelLinear(base.input_size, dim, **further, **common)
        gather = self.input_is_parallel
        self.linear_out = ColumnParallelLinear(dim, num_rows, gather_output=gather, init_method=init.zeros_, **common)
        self.dropout = Dropout(dropout) if dropout else Identity()
        config.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel and not self.input_is_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.group)
        x = self.linear_out(self.linear_in(self.dropout(x))[0])[0]
        if self.sequence_parallel and self.input_is_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.group)
        return x * (self.alpha / self.dim)


class Wrapper(Module):
    """``AdapterWrapper``, of which each kind of adapter has a subclass."""

    def __init__(self, to_wrap: Module, adapter: Module) -> None:
        super().__init__()
        self.to_wrap, self.adapter, self._adapter_enabled = to_wrap, adapter, True

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        output, bias = self.to_wrap(x)
        return self.adapted(output, x) if self._adapter_enabled else output, bias

    def adapted(self, output: Tensor, x: Tensor) -> Tensor:
        return output + self.adapter(x)


class SplitQKV(Wrapper):
    """``LoRALinearSplitQKV``."""

    def _interleave_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # As there, by the heads of all ranks: tokens come to stand together.
        config: Any = self.to_wrap.config
        heads, groups, size = config.num_attention_heads, config.num_query_groups, config.kv_channels
        parts = [query.reshape(-1, groups, heads // groups, size), *(one.reshape(-1, groups, 1, size) for one in (key, value))]
        return torch.cat(parts, dim=2).reshape(*query.shape[:-1], -1)

    def adapted(self, output: Tensor, x: Tensor) -> Tensor:
        return output + self._interleave_qkv(*(self.adapter[f"adapter_{part}"](x) for part in "qkv"))  # type: ignore[index]


class SplitGateUp(Wrapper):
    """``LoRALinearSplitFC1UpGate``."""

    def adapted(self, output: Tensor, x: Tensor) -> Tensor:
        return output + torch.cat([self.adapter[f"adapter_{part}"](x) for part in ("gate", "up")], dim=-1)  # type: ignore[index]


class WithLengths(Wrapper):
    """``DoRALinear``."""

    def __init__(self, to_wrap: Any, adapter: Any) -> None:
        super().__init__(to_wrap, adapter)
        adapter.weight_magnitude = Parameter(self.lengths())

    def lengths(self) -> Tensor:
        adapter, weight = self.adapter, self.to_wrap.weight
        factors = [adapter.linear_in.weight, adapter.linear_out.weight]
        place = 1 if adapter.input_is_parallel else 0
        factors[place] = gather_from_tensor_model_parallel_region(factors[place].T).T
        return (weight + adapter.alpha / adapter.dim * factors[1] @ factors[0]).norm(dim=1).detach()

    def adapted(self, output: Tensor, x: Tensor) -> Tensor:
        return self.adapter.weight_magnitude / self.lengths() * (output + self.adapter(x))  # type: ignore[operator]


def wrap_linears(model: Any, kind: Kind, *, dim: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze a GPTModel of dense layers, not wrapped, and give its linear layers adapters."""
    model.requires_grad_(False)
    config = model.config
    rows = {"q": config.num_attention_heads * config.kv_channels, "k": config.num_query_groups * config.kv_channels}
    rows |= {"v": rows["k"], "up": config.ffn_hidden_size, "gate": config.ffn_hidden_size}
    for layer in model.decoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            for name in [name for name in parent._modules if name.startswith("linear_")]:
                base = getattr(parent, name)
                make = lambda num_rows, base=base: LowRankPair(base, num_rows, dim, alpha, dropout)  # noqa: E731
                split = {"linear_qkv": "qkv", "linear_fc1": ("up", "gate")}.get(name) if kind == "CanonicalLoRA" else None
                adapter = make(base.output_size) if split is None else ModuleDict({f"adapter_{p}": make(rows[p]) for p in split})
                wrappers: dict[Any, type[Wrapper]] = {"qkv": SplitQKV, ("up", "gate"): SplitGateUp}
                wrapper = wrappers[split] if split else WithLengths if kind == "DoRA" else Wrapper
                setattr(parent, name, wrapper(base, adapter))
