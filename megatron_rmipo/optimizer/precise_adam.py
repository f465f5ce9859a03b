"""AdamW whose state is kept in the dtypes of ``--exp-avg-dtype`` and its like, in plain torch.

On a GPU that is Transformer Engine's FusedAdam (its ``pytorch/optimizers/fused_adam.py``), which runs nowhere else. This one
keeps the same state in the same dtypes, for the same calls of Megatron-Core's distributed optimizer. The update is torch's, in
fp32, of one parameter after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_rmipo.optimizer.remainders import joined, split

# Dtype that a state is kept in -> the largest number it is scaled to, one scale a tensor. The others are not scaled.
_LARGEST = {torch.float16: torch.finfo(torch.float16).max / 2, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
MAIN = "master_param"


class PrecisionAwareAdam(torch.optim.AdamW):
    """Stands where Megatron-Core looks for FusedAdam; names and arguments are those it calls.

    Attributes:
        store_param_remainders: fp32 master weights are kept as what bf16 weights lack of them.
        master_weights: whether there are any.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode, "weight decay is decoupled"
        assert not capturable, "there is no CUDA graph"
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.master_weights = master_weights
        self.store_param_remainders = store_param_remainders and master_weights and master_weight_dtype == torch.float32
        self._gradient = "decoupled_grad" if use_decoupled_grad else "grad"
        given = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, MAIN: master_weight_dtype}
        # Megatron says fp8 as bytes.
        self._dtypes = {name: torch.float8_e4m3fn if dtype == torch.uint8 else dtype for name, dtype in given.items()}
        self._scales: dict[tuple[Tensor, str], Tensor] = {}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        """Give a parameter the state that it starts with; master weights are as the parameter is."""
        self.state[param]["step"] = torch.tensor(0.0)
        for name in self._names:
            dtype = torch.int16 if store_param_remainders and name == MAIN else self._dtypes[name]
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
        if self.master_weights and not store_param_remainders:
            self.set_scaled_state(param, MAIN, param.detach().float())

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A state in fp32; the count of steps, remainders and what is kept in fp32 as they are, not as copies."""
        kept: Tensor = self.state[param][state_name]
        if state_name == "step" or kept.dtype in (torch.int16, torch.float32):
            return kept
        scale = self._scales.get((param, state_name))
        return kept.float() if scale is None else kept.float() * scale

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Keep a state, given in fp32 (remainders: int16), in its dtype."""
        kept: Tensor = self.state[param][state_name]
        if kept.dtype in _LARGEST:
            scale = unscaled_state.abs().amax() / _LARGEST[kept.dtype]
            self._scales[param, state_name] = scale
            unscaled_state = unscaled_state / scale.clamp(min=torch.finfo(torch.float32).tiny)
        kept.copy_(unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn every state into its parameter's dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        for number, param in enumerate(param for group in self.param_groups for param in group["params"]):
            self.state[param] = dict(state_dict["state"].get(number, {}))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                gradient = getattr(param, self._gradient, None)
                if gradient is not None:
                    self._update(param, gradient.float(), group)

    @property
    def _names(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *([MAIN] if self.master_weights else [])]

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        in_remainders = self.store_param_remainders and param.dtype == torch.bfloat16
        if not self.state[param]:
            self.initialize_state(param, in_remainders)
        now = {name: self.get_unscaled_state(param, name) for name in self._names}
        if in_remainders:
            now[MAIN] = joined(param, now[MAIN])
        main, (beta1, beta2) = now.get(MAIN, param), group["betas"]
        adamw(
            *([main], [gradient], [now["exp_avg"]], [now["exp_avg_sq"]], [], [self.state[param]["step"]]),
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if in_remainders:
            weights, now[MAIN] = split(main)
            param.copy_(weights)
        elif main is not param:
            param.copy_(main)
        for name, state in now.items():
            self.set_scaled_state(param, name, state)
