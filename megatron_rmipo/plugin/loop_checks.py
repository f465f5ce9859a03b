"""What of somebody else's loop would give other gradients than those of the mean over pairs, and end in a refusal instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch.nn import Module

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.runtime.agreement import describe_difference, is_same


def check_loop(model: Module) -> None:
    """Refuse a loop that would divide the gradient by something else than the number of pairs.

    Raises:
        ConfigError: what of the model's configuration, or of its wrapper for data parallelism, does.
    """
    # That which schedules go by; the model inside may have another.
    config = get_model_config(model)
    if not config.calculate_per_token_loss:
        raise ConfigError(
            "the model's config has calculate_per_token_loss=False: the loss would be a mean of means, which depends on how the "
            "batch is cut. Set it to True (--calculate-per-token-loss), for model and DDP."
        )
    if config.context_parallel_size > 1:
        raise ConfigError(
            f"the model's config has context_parallel_size {config.context_parallel_size}: rows are not cut over ranks "
            "in loops of others. Use 1, with tensor or pipeline parallelism for rows that are too long for one, or the trainer "
            "of this package, which cuts them."
        )
    if isinstance(model, DistributedDataParallel):
        buffers = [*model.buffers, *model.expert_parallel_buffers]
        if model.ddp_config.average_in_collective or any(buffer.gradient_scaling_factor != 1.0 for buffer in buffers):
            raise ConfigError(
                "DistributedDataParallel was made to average gradients over data-parallel ranks, and they are sums over pairs. "
                "Set calculate_per_token_loss=True before the model is wrapped, and average_in_collective=False."
            )
    if model.training and config.finalize_model_grads_func is None:
        raise ConfigError(
            "the model's config has no finalize_model_grads_func: nothing would divide the gradient by the number of pairs. Set "
            "config.finalize_model_grads_func = megatron.core.distributed.finalize_model_grads."
        )


def check_auxiliary_losses(model: Module) -> None:
    """Refuse auxiliary losses of routers where nobody knows how many tokens a pair of the global batch has.

    Raises:
        ConfigError: the model has such.
    """
    config = get_model_config(model)
    names = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    if getattr(config, "num_moe_experts", None) and any(np.any(getattr(config, name, None) or 0.0) for name in names):
        raise ConfigError(
            "the model's routers have auxiliary losses (moe_aux_loss_coeff, moe_z_loss_coeff), which Megatron sums over tokens, "
            "while the gradient is divided by pairs, and a micro-batch alone does not tell how many tokens a pair has. Set them "
            "to 0, or use megatron_rmipo.plugin.preference_batches."
        )


def refuse_different_batches(objective: Objective, batch: RankBatch, meeting: Sequence[dist.ProcessGroup]) -> None:
    """Refuse a global batch that is not the same on the ranks of each group, which call this together.

    Args:
        objective: what is trained.
        batch: this rank's share of it.
        meeting: the groups.

    Raises:
        ConfigError: on every rank of a group: what the first two that differ have.
    """
    facts = {
        "the objective": objective.name,
        "the number of micro-batches": len(batch.conditional),
        "the pairs of the first batch": batch.pair_indices.tolist(),
        "their lengths": batch.lengths.tolist(),
    }
    for group in meeting:
        if is_same(group, facts):
            continue
        given: list[dict[str, object]] = [{}] * group.size()
        dist.all_gather_object(given, facts, group=group)
        for member, theirs in enumerate(given):
            if theirs != given[0]:
                names = [f"rank {dist.get_global_rank(group, one)}" for one in (0, member)]
                raise ConfigError(describe_difference(given[0], theirs, *names))
