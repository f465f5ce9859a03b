"""How a run's pairs are laid out, from its flags and its model."""

from __future__ import annotations

import dataclasses
import math

from megatron_rmipo.config.pipeline_split import stage_shares
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.pipeline_bubble import Stages
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.attention.packed import BACKENDS, choose_backend
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.model.problems.experts import experts_cross_replicas
from megatron_rmipo.model.transformer_engine import fp8_multiple
from megatron_rmipo.objectives.base import LogpNeeds


def conditional_layout(config: Config, arch: ModelArchitecture, *, dp_rank: int, dp_size: int) -> BatchLayout:
    """How a run cuts pairs and lays them out, prompt with both responses, on one data-parallel rank."""
    parallel = config.parallel
    return BatchLayout(
        dp_rank=dp_rank,
        dp_size=dp_size,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        cost=forward_cost_model(arch, config.lora),
        share_prompts=config.model.share_prompts,
        equal_packs=arch.experts is not None and experts_cross_replicas(parallel),
        multiple_of=parallel.context_parallel_size
        * _row_multiple(config.model, arch, shards=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1),
        stages=Stages(stage_shares(arch.num_layers, parallel)),
        min_packs_per_stage=config.data.min_microbatches_per_stage,
    )


def batch_layout(
    config: Config, arch: ModelArchitecture, needs: LogpNeeds, *, context_token_id: int | None, dp_rank: int, dp_size: int
) -> BatchLayout:
    """How a run cuts a global batch into the passes that its objective needs, on one data-parallel rank.

    Args:
        config: the run's configuration.
        arch: the model.
        needs: of the objective.
        context_token_id: BOS, or what stands in for it (:mod:`megatron_rmipo.data.encoding.context_token`); where there is
            neither, an objective that asks for that context gets none.
        dp_rank: the rank.
        dp_size: ranks that share the batch.
    """
    unconditional = "none" if needs.unconditional == "bos" and context_token_id is None else needs.unconditional
    return dataclasses.replace(
        conditional_layout(config, arch, dp_rank=dp_rank, dp_size=dp_size),
        with_rejected=needs.rejected,
        unconditional=unconditional,
        # The load-balancing loss has to know the global batch's choices first.
        forward_passes=int(needs.batch) + int(needs.perturbation is not None) + int(config.experts.moe_aux_loss_coeff > 0),
        bos_token_id=context_token_id,
        columns=needs.columns,
    )


def _row_multiple(model: ModelConfig, arch: ModelArchitecture, *, shards: int) -> int:
    """What a rank's tokens of a row are a multiple of, where each of ``shards`` ranks holds an equal part of them."""
    backend = choose_backend(model.attention_backend, arch.least_head_size)
    return math.lcm(BACKENDS[backend], fp8_multiple(model) * shards)
