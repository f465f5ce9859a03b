"""The policy: a model of Megatron-Core's over packed rows, ending in log-probs instead of logits.

Shape letters: T packed tokens, N scored tokens, H hidden, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.layers.residual import scale_embedding
from megatron_rmipo.model.logprobs import ReferenceHead
from megatron_rmipo.model.packed_model import ScoringOptions, enable_scoring, score_row
from megatron_rmipo.model.rotary import PackedRotary
from megatron_rmipo.model.vocabulary_shard import LogitRules, TokenChoice
from megatron_rmipo.runtime.groups import ProcessGroups


class PolicyModel(LanguageModule):
    """What a policy is beside the class of Megatron's that it is built of: that class's parts, called for a packed row.

    Its forward takes a packed row and, on the last pipeline stage, returns log-probs of the scored tokens. Parameters and their
    names are the class's own; ``sharded_state_dict`` has GPTModel's keys, so its checkpoints are Megatron checkpoints.

    Attributes:
        architecture: the model.
        scoring_options: vocabulary and chunks.
        layers_each: layers of Megatron's that make one of the model's.
    """

    architecture: ModelArchitecture
    scoring_options: ScoringOptions
    layers_each = 1

    def become_policy(self, arch: ModelArchitecture, chunk_size: int) -> None:
        """What every class does once its parts are built."""
        self.architecture = arch
        self.scoring_options = ScoringOptions(arch.vocab_size, chunk_size, LogitRules(arch.logit_multiplier, arch.logit_softcap))
        self.rotary_pos_emb = PackedRotary(arch)
        scale_embedding(self, arch)
        enable_scoring(self)

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        source: Tensor,
        target: Tensor | None,
        reference: ReferenceHead | None = None,
        uncounted: Tensor | None = None,
        num_ungraded: int = 0,
        choice: TokenChoice | None = None,
    ) -> Tensor:
        """Run this stage over one packed row: :func:`megatron_rmipo.model.packed_model.score_row`."""
        further: dict[str, Any] = {"reference": reference, "uncounted": uncounted, "num_ungraded": num_ungraded, "choice": choice}
        return score_row(self, token_ids, position_ids, segments, source, target, options=self.scoring_options, **further)


class Policy(torch.nn.ModuleList):
    """This rank's part of the policy: its chunks, first one first, of which there is one but in an interleaved pipeline.

    Args:
        chunks: models of one configuration.
    """

    def __init__(self, chunks: Iterable[PolicyModel]) -> None:
        super().__init__(chunks)

    @property
    def config(self) -> TransformerConfig:
        """The configuration of all chunks; what the first one's has of the schedule, Megatron goes by."""
        return self._first.config

    @property
    def architecture(self) -> ModelArchitecture:
        """The model."""
        return self._first.architecture

    @property
    def layers_each(self) -> int:
        """Layers of Megatron's that make one of the model's."""
        return self._first.layers_each

    @property
    def _first(self) -> PolicyModel:
        first: Any = self[0]
        chunk: PolicyModel = first
        return chunk


class GPTPolicy(PolicyModel, GPTModel):
    """A policy of the class GPTModel, or a chunk of one.

    Args:
        config: of :func:`megatron_rmipo.model.megatron_config.transformer_config`.
        spec: the layers of this chunk.
        arch: the model.
        groups: the process groups of this rank.
        vocab_size: padded for tensor parallelism.
        chunk_size: vocabulary entries whose logits exist at a time.
        vp_stage: number of the chunk in an interleaved pipeline; None in any other.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: Any,
        arch: ModelArchitecture,
        groups: ProcessGroups,
        *,
        vocab_size: int,
        chunk_size: int,
        vp_stage: int | None = None,
    ) -> None:
        arguments = model_arguments(arch, config, groups, vp_stage)
        super().__init__(config=config, transformer_layer_spec=spec, vocab_size=vocab_size, **arguments)
        self.become_policy(arch, chunk_size)


def model_arguments(
    arch: ModelArchitecture, config: TransformerConfig, groups: ProcessGroups, vp_stage: int | None
) -> dict[str, Any]:
    """What Megatron's classes of language models are all told."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    return {
        "max_sequence_length": arch.max_position_embeddings,
        "pre_process": groups.is_first_stage and is_vp_first_stage(vp_stage, num_chunks),
        "post_process": groups.is_last_stage and is_vp_last_stage(vp_stage, num_chunks),
        "vp_stage": vp_stage,
        "parallel_output": True,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "position_embedding_type": "rope",
        "pg_collection": groups.megatron_collection(),
    }
