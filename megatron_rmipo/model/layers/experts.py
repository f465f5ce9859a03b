"""Mixtures of experts in Megatron's layers: their configuration, their layer spec, and a router that counts.

What is written is Megatron's MoELayer with its own experts and dispatchers. The router is Megatron's, but for what depends on how
a batch is cut: tokens that stand for nothing count nowhere, and auxiliary losses are those of the whole global batch.

Shape letters: T tokens of a row (this rank's, under sequence parallelism), E experts of a layer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.config.schema import ExpertsConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import Experts, ModelArchitecture
from megatron_rmipo.families.megatron_fields import expert_fields
from megatron_rmipo.model.layers.expert_biases import with_biases
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

# Megatron-Core 0.16 looks this up in its router, and defines it only where Transformer Engine is installed.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


@dataclasses.dataclass
class Tally:
    """What a router saw of the tokens that count, since it was last asked; float64 on the device.

    Attributes:
        choices: ``[E]``, how many tokens go to each expert.
        balanced_choices: ``[E]``, the same by the scores alone, as the load-balancing loss counts (without score biases).
        scores: ``[E]``, sums of the tokens' scores, which of a token sum to one.
        squared_logits: ``[1]``, sum of the tokens' squared ``logsumexp(logits)``.
    """

    choices: Tensor
    balanced_choices: Tensor
    scores: Tensor
    squared_logits: Tensor

    @classmethod
    def zeros(cls, num_experts: int) -> Tally:
        """Nothing seen."""
        sizes = (num_experts, num_experts, num_experts, 1)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=current_device()) for size in sizes))

    def add(self, logits: Tensor, routing_map: Tensor, scores: Tensor, balanced_map: Tensor, counted: Tensor) -> None:
        """Add tokens, ``[T, E]`` each, of which float64 ``counted [T]`` (0 or 1) says whether they count."""
        self.choices += counted @ routing_map.to(torch.float64)
        self.balanced_choices += counted @ balanced_map.to(torch.float64)
        self.scores += counted @ scores.detach().to(torch.float64)
        self.squared_logits += counted @ torch.logsumexp(logits.detach(), dim=-1, keepdim=True).to(torch.float64).square()

    def as_row(self) -> Tensor:
        """All of it, ``[3 E + 1]``."""
        return torch.cat([self.choices, self.balanced_choices, self.scores, self.squared_logits])


class PaddedRouter(TopKRouter):
    """Megatron's router, whose score biases do not count padding; Megatron's own fail at it."""

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
                self.local_tokens_per_expert += counted.sum(dim=0)


class Router(PaddedRouter):
    """Megatron's router, whose auxiliary losses and statistics do not depend on how the global batch is cut.

    It keeps statistics of gradient passes, and of a forward-only pass where :attr:`observes` is set; others leave no trace.

    Args:
        config: the layers'.
        has_bias: the logits have a bias, whatever linear layers have.
        **kwargs: Megatron's.

    Attributes:
        tally: see :class:`Tally`.
        observes: also keep statistics of forward-only passes.
        expert_weights: float64 ``[E]``, the gradient of the load-balancing loss by a token's scores, or None where it is off.
        z_weight: of a token's squared logsumexp in the loss; 0 where that is off.

    Both are set for each global batch (:mod:`megatron_rmipo.passes.expert_load`).
    """

    def __init__(self, config: TransformerConfig, *args: Any, has_bias: bool, **kwargs: Any) -> None:
        own_config = copy.copy(config)
        own_config.add_bias_linear = has_bias
        super().__init__(own_config, *args, **kwargs)
        self.config = config
        self.expert_bias: Tensor | None
        self.tally = Tally.zeros(self.num_experts)
        self.observes = False
        self.expert_weights: Tensor | None = None
        self.z_weight = 0.0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices, ``[T, E]``, of tokens with logits ``[T, 1, E]``; ``padding_mask`` is true where none stands."""
        trains = self.training and torch.is_grad_enabled()
        if not (trains or self.observes):
            chosen: tuple[Tensor, Tensor] = super().routing(logits, padding_mask=padding_mask)
            return chosen
        counted = logits.new_ones(logits.shape[0]) if padding_mask is None else ~padding_mask.reshape(-1)
        counted = counted.to(torch.float64)
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        logits = logits.view(-1, self.num_experts)
        balanced_map, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        with torch.no_grad():
            self.tally.add(logits, routing_map, scores, balanced_map, counted)
        if trains and self.expert_weights is not None:
            probs = MoEAuxLossAutoScaler.apply(probs, counted @ (scores.double() @ self.expert_weights))
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits ``[T, E]`` whose backward adds that of the z-loss, for tokens that count (``padding_mask [T]`` is false)."""
        if not (self.z_weight and self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        losses = squares if padding_mask is None else squares.masked_fill(padding_mask, 0.0)
        attached: Tensor = MoEAuxLossAutoScaler.apply(logits, self.z_weight * losses.sum())
        return attached

    def _apply(self, *args: Any, **kwargs: Any) -> Router:
        # Score biases decide between scores that bf16 cannot tell apart; Megatron restores the dtype, not what was rounded.
        exact: Tensor | None = self.expert_bias
        super()._apply(*args, **kwargs)
        if exact is not None:
            self.expert_bias = exact.to(self.weight.device)
        return self

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # What passes over held-out pairs choose does not count, whether gradients are on or not.
        if self.training:
            super()._apply_expert_bias(routing_map, padding_mask)


def routers(model: torch.nn.Module) -> Iterator[Router]:
    """The routers of this rank's part of a model, first layer first."""
    return (module for module in model.modules() if isinstance(module, Router))


def keep_experts_apart(model: torch.nn.Module) -> None:
    """Have Megatron reduce and optimize the weights of experts apart from others', over the ranks that hold the same experts.

    With one expert-parallel rank Megatron takes them for weights like others: checkpoints of the optimizer would then differ in
    form, and experts that tensor-parallel ranks hold whole would miss each other's tokens.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def let_go_of_graphs(model: torch.nn.Module) -> None:
    """Have no layer of experts keep the graph of a pack after its forward.

    Megatron's dispatchers keep the tokens' weights until the next pack. With them goes their graph, and of a layer that is
    computed anew its input and the gradient of that: with full recomputation, by the end of a pack, as much again as all its
    checkpoints.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(_forget_weights)


def _forget_weights(layer: MoELayer, *_: Any) -> None:
    dispatcher = layer.token_dispatcher
    # DeepEP-like ones have a manager that keeps them.
    for holder in (dispatcher, getattr(dispatcher, "_comm_manager", dispatcher)):
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(holder, name, None)


def expert_settings(arch: ModelArchitecture, groups: ProcessGroups, flags: ExpertsConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a model's experts; none for a dense model.

    Raises:
        ConfigError: a router that is not built, or a flag that needs what is not installed.
    """
    experts = arch.experts
    if experts is None:
        return {}
    problem = next(_router_problems(experts), None)
    if problem is not None:
        raise ConfigError(f"This model's router is not supported: {problem}.")
    settings: dict[str, Any] = {
        **expert_fields(arch, experts),
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expert_tp.size(),
        "moe_router_bias_update_rate": flags.moe_router_bias_update_rate,
        "moe_router_dtype": flags.moe_router_dtype,
        # For our router to read; Megatron's own balancing is off.
        "moe_aux_loss_coeff": flags.moe_aux_loss_coeff,
        "moe_z_loss_coeff": flags.moe_z_loss_coeff or None,
        "moe_grouped_gemm": flags.moe_grouped_gemm,
        "moe_token_dispatcher_type": flags.moe_token_dispatcher_type,
        "moe_permute_fusion": flags.moe_permute_fusion,
    }
    if flags.moe_flex_dispatcher_backend is not None:
        settings["moe_flex_dispatcher_backend"] = flags.moe_flex_dispatcher_backend
    return settings


def _router_problems(experts: Experts) -> Iterator[str]:
    """What Megatron's router computes otherwise than the model does."""
    if experts.per_token > experts.num_experts:
        yield f"a token cannot go through {experts.per_token} of {experts.num_experts} experts"
    if experts.score_function == "sigmoid" and not experts.normalized and experts.per_token > 1:
        yield "sigmoid scores that are not normalized over a token's experts"
    if experts.score_function == "softmax" and experts.normalized and experts.per_token == 1:
        yield "one softmax expert a token, normalized, which always weighs one and never learns"
    if experts.score_bias and experts.score_function != "sigmoid":
        yield "score biases beside softmax scores"
    if experts.num_groups is not None:
        # Megatron ranks groups by the sum of their best scores, as many as a token takes of a group; the model by the best two.
        per_group = experts.per_token / (experts.groups_per_token or 1)
        if experts.score_function != "sigmoid" or per_group != 2 or experts.num_experts % experts.num_groups:
            yield f"groups of experts, but for sigmoid scores and two experts of each group that a token uses (not {per_group:g})"


def expert_layer(dense: ModuleSpec, arch: ModelArchitecture, config: TransformerConfig, norm: type) -> ModuleSpec:
    """The layer spec ``dense`` with experts in the place of its MLP, and ``norm`` before them."""
    assert arch.experts is not None
    mixture: Any = get_moe_module_spec(
        use_te=config.transformer_impl == "transformer_engine",
        num_experts=arch.experts.num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    # A spec, or from Megatron-Core 0.19 on the call that builds the layer.
    parts = mixture.keywords["submodules"] if isinstance(mixture, partial) else mixture.submodules
    parts.router = partial(Router, has_bias=arch.experts.router_bias)
    if arch.experts.bias:
        parts.experts = with_biases(parts.experts)
    # Of a dense layer a checkpoint names this norm as part of the MLP's first matrix, where Transformer Engine has it.
    names = {name: key for name, key in dense.submodules.sharded_state_dict_keys_map.items() if name != "pre_mlp_layernorm."}
    submodules = dataclasses.replace(dense.submodules, mlp=mixture, pre_mlp_layernorm=norm, sharded_state_dict_keys_map=names)
    return ModuleSpec(module=dense.module, params=dense.params, submodules=submodules)
