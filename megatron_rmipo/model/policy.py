"""The policy: Megatron-Core's GPTModel over packed rows, ending in log-probs instead of logits.

Shape letters: T packed tokens, N scored tokens, H hidden, D rotary channels, tp tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.logprobs import ReferenceHead, head_logprobs
from megatron_rmipo.model.rotary import rotary_inverse_frequencies
from megatron_rmipo.model.vocabulary_shard import VocabularyShard
from megatron_rmipo.runtime.groups import ProcessGroups


class LogprobHead(ColumnParallelLinear):
    """The output layer, called for log-probs of targets instead of logits of every token.

    It is a module call, not a function on the bare weight, because DDP gathers a module's parameters in hooks on that call.
    """

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None,
        vocab_size: int,
        chunk_size: int,
        reference: ReferenceHead | None = None,
    ) -> Tensor:
        """fp32 ``[N]`` log-probs of ``target [N]`` under ``hidden [N, H]``; every tensor-parallel rank calls it together.

        With a reference ``[4, N]``, see :func:`megatron_rmipo.model.logprobs.head_logprobs`. The gradient of ``hidden`` is left
        unreduced under sequence parallelism: the gather before it reduce-scatters.
        """
        own_weight = self.weight if weight is None else weight
        logprobs = head_logprobs(
            hidden,
            own_weight,
            target,
            VocabularyShard(own_weight.shape[0], vocab_size, self.tp_group),
            chunk_size=chunk_size,
            reduce_hidden_grad=not self.config.sequence_parallel,
            reference=reference,
        )
        return logprobs[0] if reference is None else logprobs


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
            rotary_base=int(arch.rotary_base),
            pg_collection=groups.megatron_collection(),
            **kwargs,
        )
        self.architecture = arch
        self.chunk_size = chunk_size
        self.rotary_pos_emb.inv_freq = rotary_inverse_frequencies(arch).to(self.rotary_pos_emb.inv_freq.device)
        if self.post_process:
            # The layer stays as GPTModel built it (weight, sharding, tying); only what a call of it computes changes.
            self.output_layer.__class__ = LogprobHead

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        source: Tensor,
        target: Tensor | None,
        reference: ReferenceHead | None = None,
    ) -> Tensor:
        """Run this stage over one packed row. Every tensor-parallel rank of the stage calls it together.

        Args:
            token_ids, position_ids: int64 ``[T]``; T is a multiple of tp under sequence parallelism.
            segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
            source: int64 ``[N]``, the token whose hidden state predicts.
            target: int64 ``[N]``, the id it predicts; None to get the last stage's hidden states instead of log-probs.
            reference: on the last stage: score the targets under mixtures with a reference model, too.

        Returns:
            On the last stage fp32 ``[N]`` log-probs (with a reference ``[4, N]``, see
            :func:`megatron_rmipo.model.logprobs.head_logprobs`; without targets hidden states ``[N, H]``), else hidden states
            ``[T, 1, H]`` (``[T / tp, 1, H]`` under sequence parallelism) for the next stage.
        """
        hidden = self.embedding(input_ids=token_ids[None], position_ids=position_ids[None]) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=segments, rotary_pos_emb=self._rotary_table(position_ids))
        assert isinstance(hidden, Tensor)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp)
        scored = hidden[:, 0].index_select(0, source)
        if target is None:
            return scored
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logprobs: Tensor = self.output_layer(
            scored,
            target,
            weight=weight,
            vocab_size=self.architecture.vocab_size,
            chunk_size=self.chunk_size,
            reference=reference,
        )
        return logprobs

    def head_weight(self) -> Tensor:
        """``[V_padded / tp, H]``: this rank's rows of the output layer, tied or not. On the last stage alone."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def _rotary_table(self, position_ids: Tensor) -> Tensor:
        """Angles ``[T, 1, 1, D]`` of each token's own position: a response's positions restart where its prompt ended."""
        rotary = self.rotary_pos_emb
        if rotary.inv_freq.device != position_ids.device:
            rotary.inv_freq = rotary.inv_freq.to(position_ids.device)
        angles = torch.outer(position_ids.to(rotary.inv_freq.dtype), rotary.inv_freq)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
