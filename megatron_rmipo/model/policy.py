"""The policy: Megatron-Core's GPTModel over packed rows, ending in log-probs instead of logits.

Shape letters: T packed tokens, N scored tokens, H hidden, tp tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.logprobs import ReferenceHead
from megatron_rmipo.model.packed_model import ScoringOptions, enable_scoring, score_row
from megatron_rmipo.model.residual import scale_embedding
from megatron_rmipo.model.rotary import PackedRotary
from megatron_rmipo.model.vocabulary_shard import LogitRules
from megatron_rmipo.runtime.groups import ProcessGroups


class PolicyModel(GPTModel):
    """GPTModel whose forward takes a packed row and, on the last pipeline stage, returns log-probs of the scored tokens.

    Parameters, their names and ``sharded_state_dict`` are GPTModel's own, so its checkpoints are Megatron checkpoints.
    """

    def __init__(
        self, config: TransformerConfig, spec: Any, arch: ModelArchitecture, groups: ProcessGroups, **kwargs: Any
    ) -> None:
        chunk_size, vocab_size = kwargs.pop("chunk_size"), kwargs.pop("vocab_size")
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            pg_collection=groups.megatron_collection(),
            **kwargs,
        )
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
    ) -> Tensor:
        """Run this stage over one packed row: :func:`megatron_rmipo.model.packed_model.score_row`."""
        further: dict[str, Any] = {"options": self.scoring_options, "reference": reference, "uncounted": uncounted}
        return score_row(self, token_ids, position_ids, segments, source, target, **further)

    def head_weight(self) -> Tensor:
        """``[V_padded / tp, H]``: this rank's rows of the output layer, tied or not. On the last stage alone."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight
