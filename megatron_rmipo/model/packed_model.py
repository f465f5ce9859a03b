"""The seam to Megatron's model: a packed row through its parts, ending in log-probs instead of logits.

Written against what Megatron-Core's language models have in common (``embedding``, ``decoder``, ``output_layer``,
``rotary_pos_emb``), whoever built them.

Shape letters: T packed tokens, L those that a context-parallel rank holds, T / cp, N scored tokens, H hidden, tp tensor-parallel
and cp context-parallel size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import Module, ModuleList

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.attention.context_parallel import join_scores
from megatron_rmipo.model.attention.deal import HeldTriples, held_triples, row_share
from megatron_rmipo.model.layers.activation_offloading import begin_row
from megatron_rmipo.model.logprobs import ReferenceHead, head_logprobs, head_tokens
from megatron_rmipo.model.vocabulary_shard import PLAIN_LOGITS, LogitRules, TokenChoice, VocabularyShard

# This rank's part of a model, wrapped or not; of an interleaved pipeline its chunks.
Chunks = Module | Sequence[Module]


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """What scoring with a model needs to know beside the model.

    Attributes:
        vocab_size: real vocabulary, without padding for tensor parallelism.
        chunk_size: vocabulary entries whose logits exist at a time.
        logits: what makes them of the products of hidden states and head.
        longest: tokens of the longest sequence that the model has positions for; None: of any.
    """

    vocab_size: int
    chunk_size: int = 4096
    logits: LogitRules = PLAIN_LOGITS
    longest: int | None = None


class Replacement:
    """Stands in a module's ``__dict__`` in the place of one of its methods: no class, no name and no state changes.

    Programs that go by a module's class find the one they know, and a copy of the module has a copy of this.

    Args:
        module: whose method.
        name: of the method.

    Attributes:
        behind: the method, as it was.
        outlives_attach: whether it stays when a model that others built takes packed rows no more.
    """

    outlives_attach = False

    def __init__(self, module: Module, name: str = "forward") -> None:
        self.behind: Any = getattr(module, name)
        self._module, self._name, self._in_dict = module, name, vars(module).get(name)
        vars(module)[name] = self

    def remove(self) -> None:
        """Give the module its method back."""
        del vars(self._module)[self._name]
        if self._in_dict is not None:
            vars(self._module)[self._name] = self._in_dict


class LogprobHead(Replacement):
    """The call of an output layer, for log-probs of targets instead of logits of every token.

    It is a module call, not a function on the bare weight, because DDP gathers a module's parameters in hooks on that call.

    Args:
        layer: Megatron's ColumnParallelLinear.
    """

    def __init__(self, layer: ColumnParallelLinear) -> None:
        super().__init__(layer)
        self.layer = layer

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        *args: Any,
        target: Tensor | None = None,
        options: ScoringOptions | None = None,
        reference: ReferenceHead | None = None,
        num_ungraded: int = 0,
        choice: TokenChoice | None = None,
        **kwargs: Any,
    ) -> Any:
        """fp32 ``[N]`` log-probs of ``target [N]`` under ``hidden [N, H]``; every tensor-parallel rank calls it together.

        With a reference ``[4, N]``, see :func:`megatron_rmipo.model.logprobs.head_logprobs`, also for ``num_ungraded``. The
        gradient of ``hidden`` is left unreduced under sequence parallelism: the gather before it reduce-scatters. With a choice
        int64 ``[N]``, the tokens chosen to come next. Without either it is Megatron's own call.
        """
        if target is None and choice is None:
            return self.behind(hidden, weight, *args, **kwargs)
        assert options is not None
        own_weight = self.layer.weight if weight is None else weight
        shard = VocabularyShard(own_weight.shape[0], options.vocab_size, self.layer.tp_group)
        if choice is not None:
            return head_tokens(hidden, own_weight, shard, choice, chunk_size=options.chunk_size, rules=options.logits)
        assert target is not None
        logprobs = head_logprobs(
            hidden,
            own_weight,
            target,
            shard,
            chunk_size=options.chunk_size,
            reduce_hidden_grad=not self.layer.config.sequence_parallel,
            rules=options.logits,
            reference=reference,
            num_ungraded=num_ungraded,
        )
        return logprobs[0] if reference is None else logprobs


def enable_scoring(model: Module) -> None:
    """Make the output layer of a model, where this rank has it, one that gives log-probs.

    The layer stays as its model built it (weight, sharding, tying); only what a call of it computes changes.
    """
    if model.post_process:
        LogprobHead(model.output_layer)


def unwrapped(model: Module) -> Any:
    """The model inside of wrappers for data parallelism and mixed precision."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def chunks_of(model: Chunks) -> list[Module]:
    """This rank's chunks of an interleaved pipeline, first one first; of any other model the one it has."""
    return list(model) if isinstance(model, Sequence | ModuleList) else [model]


def scoring_options(model: Module) -> ScoringOptions:
    """What a model that takes packed rows, wrapped or not, was told of scoring.

    Raises:
        ConfigError: it takes none.
    """
    inner = unwrapped(model)
    options = getattr(inner, "scoring_options", None)
    if not isinstance(options, ScoringOptions):
        raise ConfigError(
            f"this {type(inner).__name__} takes no packed rows yet. Call megatron_rmipo.plugin.attach(model, vocab_size=...) "
            "first, on every rank."
        )
    return options


def head_weight(model: Module) -> Tensor:
    """``[V_padded / tp, H]``: this rank's rows of a model's output layer, tied or not. On the last stage alone."""
    inner = unwrapped(model)
    tied = inner.share_embeddings_and_output_weights
    weight: Tensor = inner.shared_embedding_or_output_weight() if tied else inner.output_layer.weight
    return weight


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
    num_ungraded: int = 0,
    choice: TokenChoice | None = None,
) -> Tensor:
    """Run a stage of a model over one packed row. Every tensor- and context-parallel rank of the stage calls it together.

    Context-parallel ranks are all handed the whole row. Each runs its own tokens through the layers, scores those of the N whose
    source it holds, and has all N in the end.

    Args:
        model: this rank's part of the model, not wrapped, with packed attention (see
            :mod:`megatron_rmipo.model.attention.packed`) in its layers and a :class:`LogprobHead`: our own, or one that
            :func:`megatron_rmipo.model.adopt.attach_model` made so.
        token_ids, position_ids: int64 ``[T]``; T is a multiple of cp, under sequence parallelism of cp times tp.
        segments: int64 ``[S, 4]`` on the CPU, see :mod:`megatron_rmipo.model.attention.packed`.
        source: int64 ``[N]``, the token whose hidden state predicts.
        target: int64 ``[N]``, the id it predicts; None to get the last stage's hidden states instead of log-probs, of what this
            rank scores.
        options: vocabulary, chunks, and what logits are.
        reference: on the last stage: score the targets under mixtures with a reference model, too, of which it holds the hidden
            states that this function gave without targets.
        uncounted: bool ``[T]``: padding, and all of a filler. Such tokens go through experts as others do, whose routers leave
            them out of loads, score biases and auxiliary losses. None: all count.
        num_ungraded: the last so many of the N carry no gradient.
        choice: on the last stage: choose a next token behind each source, and score none.

    Returns:
        On the last stage fp32 ``[N]`` log-probs (with a reference ``[4, N]``, see
        :func:`megatron_rmipo.model.logprobs.head_logprobs`; without targets hidden states ``[N, H]``, or with a choice the ids of
        next tokens, int64 ``[N]``), else hidden states ``[L, 1, H]`` (``[L / tp, 1, H]`` under sequence parallelism) for the next
        stage.
    """
    cp_group: Any = getattr(model.pg_collection, "cp", None)
    held = None
    if cp_group is not None and cp_group.size() > 1:
        share = row_share(segments, cp_group, token_ids.device)
        token_ids, position_ids = token_ids[share.places], position_ids[share.places]
        uncounted = None if uncounted is None else uncounted[share.places]
        # Before the layers: the host waits for what the device finds.
        held = held_triples(source, share, num_ungraded) if model.post_process else None
    hidden = _hidden_states(model, token_ids, position_ids, segments, uncounted)
    if not model.post_process:
        return hidden
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=model.pg_collection.tp)
    scored = hidden[:, 0].index_select(0, source if held is None else held.source)
    if target is None and choice is None:
        return scored
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    if choice is not None:
        return _next_tokens(model, scored, weight, choice, options, held, source.numel(), cp_group)
    assert target is not None
    scoring: dict[str, Any] = {"options": options, "reference": reference, "num_ungraded": num_ungraded}
    if held is None:
        logprobs: Tensor = model.output_layer(scored, weight, target=target, **scoring)
        return logprobs
    scoring["num_ungraded"] = held.num_ungraded
    own = model.output_layer(scored, weight, target=target[held.numbers], **scoring)
    return join_scores(own, held.numbers, source.numel(), cp_group)


def _next_tokens(
    model: Any,
    hidden: Tensor,
    weight: Tensor | None,
    choice: TokenChoice,
    options: ScoringOptions,
    held: HeldTriples | None,
    num_scored: int,
    cp_group: Any,
) -> Tensor:
    """int64 ``[N]``, on every context-parallel rank, each of which chooses behind the sources that it holds."""
    if held is None:
        tokens: Tensor = model.output_layer(hidden, weight, choice=choice, options=options)
        return tokens
    own = choice.at(choice.places[number] for number in held.numbers.tolist())
    return join_scores(model.output_layer(hidden, weight, choice=own, options=options), held.numbers, num_scored, cp_group)


def _hidden_states(model: Any, token_ids: Tensor, position_ids: Tensor, segments: Tensor, uncounted: Tensor | None) -> Tensor:
    """What the last layer of this stage gives, ``[L, 1, H]``, or ``[L / tp, 1, H]`` under sequence parallelism."""
    begin_row(model)
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
    """Bool ``[1, L]`` as layers of experts take it: of this rank's tokens, ``[1, L / tp]``, under sequence parallelism."""
    if model.config.sequence_parallel:
        tp_group = model.pg_collection.tp
        uncounted = uncounted.chunk(tp_group.size())[tp_group.rank()]
    return uncounted[None]
