"""What a global batch makes experts do: auxiliary losses that do not depend on how it is cut, and figures of their load.

Every function here is collective: all ranks of the run call it together.

Shape letters: L layers, E experts of a layer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.model.layers.experts import Router, Tally, routers
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.passes.rows import run_rows
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


@torch.no_grad()
def set_auxiliary_losses(model: Chunks, policy: Policy, batch: RankBatch, groups: ProcessGroups) -> None:
    """Prepare the routers for the gradient pass of a global batch: nothing where both losses are off.

    With ``f_e`` the share of token-choices that went to expert e and ``P_e`` the mean score, the load-balancing loss of a layer
    is ``E sum_e f_e P_e`` (Switch Transformer, arXiv:2101.03961, eq. 4), the z-loss the mean squared ``logsumexp`` of the
    logits (ST-MoE, arXiv:2202.08906, eq. 5), both over all tokens of the gradient pass's rows on all ranks. ``f_e`` has no
    gradient, and has to be known before the first pack's backward: it takes a forward-only pass.

    Args:
        model: the policy, perhaps wrapped, in evaluation mode.
        policy: the policy itself.
        batch: this rank's share.
        groups: the process groups of this rank.
    """
    config = policy.config
    if not config.num_moe_experts or not (config.moe_aux_loss_coeff or config.moe_z_loss_coeff):
        return
    # Megatron divides all gradients by the number of pairs, which each context-parallel rank counts.
    pairs_per_token = groups.cp_size * batch.num_pairs / batch.num_gradient_tokens
    own = list(routers(policy))
    if config.moe_aux_loss_coeff:
        choices = _count_choices(model, policy, own, batch, groups)
        shares = choices / (config.moe_router_topk * batch.num_gradient_tokens)
        weights = config.moe_aux_loss_coeff * config.num_moe_experts * pairs_per_token * shares
        for router in own:
            router.expert_weights = weights[_layer(router, policy)]
    for router in own:
        router.z_weight = (config.moe_z_loss_coeff or 0.0) * pairs_per_token


def _count_choices(model: Chunks, policy: Policy, own: list[Router], batch: RankBatch, groups: ProcessGroups) -> Tensor:
    """How many tokens go to each expert by the scores alone, float64 ``[L, E]``."""
    kept = [router.tally for router in own]
    for router in own:
        router.tally, router.observes = Tally.zeros(router.num_experts), True
    run_rows(model, batch.conditional, lambda row, output: None, name="expert load pass", backward=False)
    counted = _over_all_ranks(
        policy, [(router, router.tally.balanced_choices) for router in own], policy.config.num_moe_experts, groups
    )
    for router, tally in zip(own, kept, strict=True):
        router.tally, router.observes = tally, False
    return counted


def take_expert_load(policy: Policy, groups: ProcessGroups, *, each: bool = False) -> dict[str, float]:
    """Figures of what gradient passes gave experts to do since this was last asked; empty for a dense model.

    Args:
        policy: this rank's part of the policy.
        groups: the process groups of this rank.
        each: also every expert's share of its layer's token-choices.
    """
    if not policy.config.num_moe_experts:
        return {}
    size = policy.config.num_moe_experts
    own = list(routers(policy))
    table = _over_all_ranks(policy, [(router, router.tally.as_row()) for router in own], 3 * size + 1, groups).cpu()
    for router in own:
        router.tally = Tally.zeros(size)
    layers = table[:, :size].sum(dim=1).nonzero().flatten().tolist()
    if not layers:
        return {}
    choices, balanced, scores, squares = torch.tensor_split(table[layers], [size, 2 * size, 3 * size], dim=1)
    num_choices = choices.sum(dim=1, keepdim=True)
    num_tokens = num_choices / policy.config.moe_router_topk
    shares = choices / num_choices
    imbalance = shares.amax(dim=1) * size
    figures = {
        "experts/imbalance": float(imbalance.mean()),
        "experts/imbalance_worst_layer": float(imbalance.max()),
        "experts/idle": float((choices == 0).double().mean()),
        "experts/load_balancing_loss": float(size * (balanced / num_choices * scores / num_tokens).sum(dim=1).mean()),
        "experts/z_loss": float((squares / num_tokens).mean()),
    }
    if each:
        for layer, row in zip(layers, shares.tolist(), strict=True):
            figures.update({f"experts/layer_{layer}/share_{expert}": share for expert, share in enumerate(row)})
    return figures


def _layer(router: Router, policy: Policy) -> int:
    """Number of a router's layer of the model, counted from 0 over all stages."""
    assert router.layer_number is not None
    return (int(router.layer_number) - 1) // policy.layers_each


def _over_all_ranks(policy: Policy, values: list[tuple[Router, Tensor]], width: int, groups: ProcessGroups) -> Tensor:
    """Sums over ranks of what routers hold, ``[L, width]``; zero for layers without experts.

    Each token of the global batch is one rank's: of one replica, of one of its context-parallel ranks, and under sequence
    parallelism, which experts need at TP > 1, of one of its tensor-parallel ranks.
    """
    table = torch.zeros(policy.config.num_layers, width, dtype=torch.float64, device=current_device())
    for router, row in values:
        table[_layer(router, policy)] = row
    dist.all_reduce(table, group=groups.world)
    return table
