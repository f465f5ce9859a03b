"""Root-mean-square norms: of hidden states, of the channels of a head, of all heads together.

Shape letters: H hidden, T packed tokens of a rank, A heads of a rank, D head size, tp tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rmipo.model.products import accumulation_dtype
from megatron_rmipo.runtime.groups import current_device


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for the local layer spec, of hidden states, or of the channels of each head.

    Megatron-Core's wrapper around torch's norm refuses sequence parallelism; this one marks its weight, so that Megatron sums
    its gradient over the tensor-parallel group.

    Args:
        config: ``sequence_parallel``, ``params_dtype`` and ``layernorm_zero_centered_gamma`` are read; with the last, what is
            normed is multiplied by one plus the weight.
        hidden_size: how many channels are normed together: H, or those of a head.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = _weight(config, hidden_size, 0.0 if self.zero_centered else 1.0)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension (statistics in fp32 for lower dtypes)."""
        if not self.zero_centered:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        # One plus a small weight is no number of bf16: the product, too, is made in fp32.
        precise = hidden.to(accumulation_dtype(hidden.dtype))
        return F.rms_norm(precise, self.weight.shape, 1.0 + self.weight.to(precise.dtype), self.eps).to(hidden.dtype)


class WholeNorm(torch.nn.Module):
    """Root-mean-square norm of queries, or keys, over all heads of all tensor-parallel ranks together.

    A rank has the weight of its own heads' channels. What it needs of the others are their sums of squares.

    Args:
        config: ``params_dtype`` is read.
        size: channels of this rank's heads, A D.
        eps: added to the mean square.
        tp_group: this rank's tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, size: int, eps: float, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = _weight(config, size, 1.0)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.eps, self.tp_group = eps, tp_group

    def forward(self, heads: Tensor) -> Tensor:
        """Normalize ``[T, 1, A, D]`` over all channels (in fp32 for lower dtypes). All ranks of the group call it together."""
        precise = heads.flatten(-2).to(accumulation_dtype(heads.dtype))
        squares = precise.square().sum(-1, keepdim=True)
        # Every rank's outputs depend on the sum, and so the gradients of the sum are added up, too.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scale = torch.rsqrt(squares / (precise.shape[-1] * self.tp_group.size()) + self.eps)
        return (self.weight * (precise * scale)).to(heads.dtype).view(heads.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as Megatron's checkpoints hold it, cut over the tensor-parallel group."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return state


def _weight(config: TransformerConfig, size: int, value: float) -> torch.nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else current_device()
    return torch.nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
