"""A weight that Megatron's DDP may have wrapped: when it may be read, and where its gradient goes.

Shape letters: V/tp rows of a weight, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.products import add_product, product


def wrapped_by_ddp(weight: Any) -> bool:
    """Whether Megatron's DDP has given this weight a ``main_grad``; its FSDP, which lends one only at times, does not count."""
    return hasattr(weight, "grad_added_to_main_grad") and hasattr(weight, "main_grad") and not hasattr(weight, "__fsdp_param__")


def call_for_weight(module: torch.nn.Module, use: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
    """``use(hidden, module.weight)`` as a call of the module, so that the hooks on its calls run.

    With ``overlap_param_gather`` Megatron's DDP waits in such a hook until the weight is gathered.

    Args:
        module: an output layer, or the embedding whose weight it shares.
        use: what is computed in place of the module's forward.
        hidden: what the hooks see as its input.

    Raises:
        ConfigError: the module has no weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(
            f"{type(module).__name__} holds no weight: with tied embeddings hand over the module that does, such as "
            "model.embedding.word_embeddings"
        )
    replaced = vars(module).get("forward")
    # Megatron gathers into the same tensor.
    module.forward = lambda hidden: use(hidden, weight)
    try:
        result: Tensor = module(hidden)
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced
    return result


def refuse_weight_in_buffer(weight: Tensor) -> None:
    """Refuse a bare weight that the distributed optimizer gathers into its buffer, maybe at this moment.

    Whether DDP overlaps that with the forward pass cannot be seen on the weight. Read too early it is the one of the step before;
    and where it has a bucket of its own, nobody waits for it, and Megatron's next step dies in an assertion.

    Raises:
        ConfigError: the weight is a view of such a buffer.
    """
    if wrapped_by_ddp(weight) and weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        raise ConfigError(
            f"weight {list(weight.shape)} lies in a buffer of Megatron's distributed optimizer, which may still be gathering it: "
            "hand over the module that holds it (model.output_layer; with tied embeddings model.embedding.word_embeddings) "
            "instead of its weight"
        )


class WeightGrad:
    """The gradient of a weight, made rows at a time: in DDP's buffer where a backward pass ends there, else in a tensor.

    ``grad_added_to_main_grad`` stays as it is. Megatron's fused layers set it, and DDP's hook then drops what autograd has for
    the weight until the buffer is zeroed; but of an ordinary call of the same weight, in this pass or another one of the step,
    that is the gradient. So autograd gets nothing to add from here, in a form that costs nothing.

    Args:
        weight: ``[V/tp, H]``, the one that was handed to the autograd function.
        node: where autograd takes its gradient: the weight's entry of the function's ``next_functions``.
        valid_rows: rows from there on are padding, and their gradient is zero.
    """

    def __init__(self, weight: Tensor, node: Any, valid_rows: int) -> None:
        self._weight: Any = weight
        self._accumulates = wrapped_by_ddp(weight) and _will_accumulate(node)
        if not self._accumulates:
            self._grad = torch.empty_like(weight)
            self._grad[valid_rows:] = 0

    def put(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Rows of the gradient are ``left @ right``: every token at once, so each row is written once."""
        if self._accumulates:
            add_product(self._weight.main_grad[rows], left, right)
        else:
            product(left, right, out=self._grad[rows])

    def for_autograd(self) -> Tensor:
        """What the autograd function returns for the weight."""
        if not self._accumulates:
            return self._grad
        # Not None: with overlap_grad_reduce DDP's hook wants some gradient. This one holds no number, and adds none.
        nothing: Tensor = self._weight.new_empty(self._weight.shape, layout=torch.sparse_coo)
        return nothing


def _will_accumulate(node: Any) -> bool:
    """Whether the backward pass that runs now ends in the weight, where DDP's hook waits."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # torch.autograd.grad() asks for the weight's gradient itself, and torch answers this question with an error.
        return False
