"""The seam to Megatron's model: a packed row through its parts, ending in log-probs instead of logits.

Written against what Megatron-Core's language models have in common (``embedding``, ``decoder``, ``output_layer``,
``rotary_pos_emb``), whoever built them.

Shape letters: T packed tokens, N scored tokens, H hidden, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.model.logprobs import ReferenceHead, head_logprobs
from megatron_rmipo.model.vocabulary_shard import PLAIN_LOGITS, LogitRules, VocabularyShard


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """What scoring with a model needs to know beside the model.

    Attributes:
        vocab_size: real vocabulary, without padding for tensor parallelism.
        chunk_size: vocabulary entries whose logits exist at a time.
        logits: what makes them of the products of hidden states and head.
    """

    vocab_size: int
    chunk_size: int = 4096
    logits: LogitRules = PLAIN_LOGITS


class LogprobHead(ColumnParallelLinear):
    """The output layer, called for log-probs of targets instead of logits of every token.

    It is a module call, not a function on the bare weight, because DDP gathers a module's parameters in hooks on that call.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        target: Tensor | None = None,
        options: ScoringOptions | None = None,
        reference: ReferenceHead | None = None,
    ) -> Any:
        """fp32 ``[N]`` log-probs of ``target [N]`` under ``hidden [N, H]``; every tensor-parallel rank calls it together.

        With a reference ``[4, N]``, see :func:`megatron_rmipo.model.logprobs.head_logprobs`. The gradient of ``hidden`` is left
        unreduced under sequence parallelism: the gather before it reduce-scatters. Without targets it is Megatron's own call.
        """
        if target is None:
            return super().forward(hidden, weight, runtime_gather_output)
        assert options is not None
        own_weight = self.weight if weight is None else weight
        logprobs = head_logprobs(
            hidden,
            own_weight,
            target,
            VocabularyShard(own_weight.shape[0], options.vocab_size, self.tp_group),
            chunk_size=options.chunk_size,
            reduce_hidden_grad=not self.config.sequence_parallel,
            rules=options.logits,
            reference=reference,
        )
        return logprobs[0] if reference is None else logprobs


def enable_scoring(model: Module) -> None:
    """Make the output layer of a model, where this rank has it, one that gives log-probs.

    The layer stays as its model built it (weight, sharding, tying); only what a call of it computes changes.
    """
    if model.post_process:
        model.output_layer.__class__ = LogprobHead


@contextlib.contextmanager
def scoring_disabled(model: Module) -> Iterator[None]:
    """Undo :func:`enable_scoring` for the time of a block, for programs that go by the name of a module's class."""
    if not model.post_process:
        yield
        return
    enabled = model.output_layer.__class__
    model.output_layer.__class__ = ColumnParallelLinear
    try:
        yield
    finally:
        model.output_layer.__class__ = enabled


def unwrapped(model: Module) -> Any:
    """The model inside of wrappers for data parallelism and mixed precision."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def score_row(
    model: Any,
    token_ids: Tensor,
    position_ids: Tensor,
    segments: Tensor,
    source: Tensor,
    target: Tensor | None,
    *,
    options: ScoringOptions,
    reference: ReferenceHead | None = None,
    uncounted: Tensor | None = None,
) -> Tensor:
    """Run a stage of a model over one packed row. Every tensor-parallel rank of the stage calls it together.

    Args:
        model: this rank's part of the model, not wrapped, with packed attention (see
            :mod:`megatron_rmipo.model.attention.packed`) in its layers and a :class:`LogprobHead`: our own, or one that
            :func:`megatron_rmipo.model.adopt.adopt_model` made so.
        token_ids, position_ids: int64 ``[T]``; T is a multiple of tp under sequence parallelism.
        segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
        source: int64 ``[N]``, the token whose hidden state predicts.
        target: int64 ``[N]``, the id it predicts; None to get the last stage's hidden states instead of log-probs.
        options: vocabulary, chunks, and what logits are.
        reference: on the last stage: score the targets under mixtures with a reference model, too.
        uncounted: bool ``[T]``: padding, and all of a filler. Such tokens go through experts as others do, whose routers leave
            them out of loads, score biases and auxiliary losses. None: all count.

    Returns:
        On the last stage fp32 ``[N]`` log-probs (with a reference ``[4, N]``, see
        :func:`megatron_rmipo.model.logprobs.head_logprobs`; without targets hidden states ``[N, H]``), else hidden states
        ``[T, 1, H]`` (``[T / tp, 1, H]`` under sequence parallelism) for the next stage.
    """
    hidden = _hidden_states(model, token_ids, position_ids, segments, uncounted)
    if not model.post_process:
        return hidden
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=model.pg_collection.tp)
    scored = hidden[:, 0].index_select(0, source)
    if target is None:
        return scored
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logprobs: Tensor = model.output_layer(scored, weight, target=target, options=options, reference=reference)
    return logprobs


def _hidden_states(model: Any, token_ids: Tensor, position_ids: Tensor, segments: Tensor, uncounted: Tensor | None) -> Tensor:
    """What the last layer of this stage gives, ``[T, 1, H]``, or ``[T / tp, 1, H]`` under sequence parallelism."""
    # Models without rotary embeddings have no such part.
    rotary = getattr(model, "rotary_pos_emb", None)
    hidden = model.decoder(
        # Later stages have been handed theirs by the schedule.
        hidden_states=model.embedding(input_ids=token_ids[None], position_ids=position_ids[None]) if model.pre_process else None,
        attention_mask=segments,
        rotary_pos_emb=None if rotary is None else rotary(position_ids),
        padding_mask=None if uncounted is None else _padding_mask(model, uncounted),
    )
    assert isinstance(hidden, Tensor)
    return hidden


def _padding_mask(model: Any, uncounted: Tensor) -> Tensor:
    """Bool ``[1, T]`` as layers of experts take it: of this rank's tokens, ``[1, T / tp]``, under sequence parallelism."""
    if model.config.sequence_parallel:
        tp_group = model.pg_collection.tp
        uncounted = uncounted.chunk(tp_group.size())[tp_group.rank()]
    return uncounted[None]
