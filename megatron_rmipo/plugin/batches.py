"""Prepared pairs as the micro-batches that other people's loops take from an iterator."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit
from megatron_rmipo.data.batches.order_names import NEW_ORDER, OrderName, pair_order
from megatron_rmipo.data.batches.padded_batches import PaddedBatchBuilder
from megatron_rmipo.data.batches.padding import PaddedShape, Row, check_pad_to
from megatron_rmipo.data.batches.read_ahead import iterate_batches
from megatron_rmipo.data.batches.sizes import BY_TOKENS
from megatron_rmipo.data.store.collection import PairCollection, PairData, open_pairs
from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.contract import check_objective
from megatron_rmipo.passes.needed_data import check_needed
from megatron_rmipo.plugin.context import ContextTokenId, context_token
from megatron_rmipo.runtime.groups import ProcessGroups


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One packed row of a global batch, or the padded rows that run together.

    Attributes:
        batch: the global batch, as this data-parallel rank sees it.
        number: which of its micro-batches with gradient.
    """

    batch: RankBatch
    number: int

    @property
    def row(self) -> Row:
        """What the model runs, on the CPU."""
        return self.batch.conditional[self.number]


class PreferenceBatches(Iterator[Microbatch]):
    """Micro-batches of a run, one after the other, the same number for each global batch.

    Args:
        batches: the run's global batches, as this rank sees them.
        consumed_pairs: pairs of the run that were seen before.
        order: the name of their order.

    Attributes:
        consumed_pairs, order: what a run that goes on hands to :func:`preference_batches` again.
    """

    def __init__(self, batches: Iterator[RankBatch], *, consumed_pairs: int = 0, order: OrderName = NEW_ORDER) -> None:
        self.consumed_pairs = consumed_pairs
        self.order = order
        self._batches = batches
        self._upcoming: deque[Microbatch] = deque()

    def __next__(self) -> Microbatch:
        microbatch = self._first()
        self._upcoming.popleft()
        if not self._upcoming:
            self.consumed_pairs += microbatch.batch.num_pairs
        return microbatch

    def peek(self) -> RankBatch:
        """The global batch of the next micro-batch, which is not taken: for a pass over it before the schedule starts.

        Raises:
            StopIteration: the run is over.
        """
        return self._first().batch

    def chunks(self, num_chunks: int) -> list[Iterator[Microbatch]]:
        """Iterators over the same micro-batches, one for each chunk of an interleaved pipeline.

        They are made once, before the first step; from then on this iterator is there to :meth:`peek` into and to count.
        """
        return list(itertools.tee(self, num_chunks))

    def _first(self) -> Microbatch:
        if not self._upcoming:
            batch = next(self._batches)
            self._upcoming.extend(Microbatch(batch, number) for number in range(len(batch.conditional)))
        return self._upcoming[0]


def preference_batches(
    data: PairData,
    objective: Objective,
    *,
    global_batch_size: int,
    num_microbatches: int,
    layout: Literal["packed", "padded"] = "packed",
    tokens_per_microbatch: int | None = None,
    vocab_size: int | None = None,
    pad_to: int | None = None,
    total_pairs: int | None = None,
    consumed_pairs: int = 0,
    seed: int = 1234,
    order: OrderName = NEW_ORDER,
    unconditional: Literal["rows", "pass"] = "rows",
    context_token_id: ContextTokenId = "bos",
    share_prompts: bool = True,
    multiple_of: int = 1,
    groups: ProcessGroups | None = None,
    num_workers: int = 0,
) -> PreferenceBatches:
    """Micro-batches for this rank, on every pipeline stage the same. No communication.

    Args:
        data: ``PREFIX`` of prepared data, several, a collection that has what the objective reads beside the pairs, or
            ``(prompt_ids, chosen_ids, rejected_ids)`` of each pair.
        objective: what is trained; it says which responses are laid out.
        global_batch_size: pairs of a step, over all data-parallel ranks.
        num_microbatches: of a step on each rank, the same at every step: what the loop gives Megatron's schedule.
        layout: ``packed`` for models that are attached: no padding, a prompt once. ``padded`` for any other: a row for each
            response, behind its prompt.
        tokens_per_microbatch: packed: most tokens of a row; None: as many as come together, in as many rows in every pass.
        vocab_size: padded: that of the model, without padding for tensor parallelism; logits from there on do not count.
        pad_to: tokens of every row, as pipelines without ``variable_seq_lengths`` want them; of padded ones each micro-batch then
            has as many. None: as many as a packed row, or the longest padded one of a micro-batch, takes.
        total_pairs: pairs of the run; None: one epoch.
        consumed_pairs: pairs seen before; the order goes on from there.
        seed: of the order.
        order: ``keyed``, or ``permuted`` for a run that a version without this argument began; a run that goes on gives what its
            :attr:`PreferenceBatches.order` was, so that the pairs that are left are those that it has not seen.
        unconditional: where log p(y) comes from, should the objective read it: ``rows`` lays the responses alone into the rows
            of the gradient pass, ``pass`` leaves them to :meth:`megatron_rmipo.plugin.step.PreferenceStep.before_step`.
        context_token_id: the token before a response in log p(y); ``bos``: that of the data's tokenizer; None: its first token is
            not scored.
        share_prompts: packed: a prompt stands once for both responses.
        multiple_of: rows are padded to a multiple of this many tokens, TP under sequence parallelism.
        groups: the process groups of this rank; None: Megatron's.
        num_workers: processes that prepare batches ahead.

    Raises:
        ConfigError: an argument is none that there is; a pair, or the pairs of a step, fit no micro-batch; the layout cannot
            give what the objective reads.
        DataError: as of :func:`pairs_for`.
    """
    _check_choice("layout", layout, ("packed", "padded"))
    _check_choice("unconditional", unconditional, ("rows", "pass"))
    _check_choice("order", order, get_args(OrderName))
    _check_numbers(1, global_batch_size=global_batch_size, num_microbatches=num_microbatches, multiple_of=multiple_of)
    _check_numbers(0, consumed_pairs=consumed_pairs)
    groups = groups or ProcessGroups.of_megatron()
    if layout == "packed" and pad_to is not None:
        _refuse_given(f"rows of pad_to {pad_to} tokens", tokens_per_microbatch=tokens_per_microbatch)
        check_pad_to(pad_to, multiple_of)
        tokens_per_microbatch = multiple_of = pad_to
    pairs = pairs_for(data, objective)
    needs = objective.needs
    context = context_token(context_token_id, pairs) if needs.unconditional == "bos" else None
    batch_layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        tokens_per_microbatch=tokens_per_microbatch,
        cost=BY_TOKENS,
        share_prompts=share_prompts,
        with_rejected=needs.rejected,
        unconditional=needs.unconditional,
        unconditional_in_rows=unconditional == "rows",
        bos_token_id=context,
        columns=needs.columns,
        multiple_of=multiple_of,
        # Ranks that meet in layers of experts run as many rows in the passes before the step, too.
        equal_packs=groups.ep.size() > 1,
        num_microbatches=num_microbatches,
    )
    builder: BatchBuilder
    if layout == "padded":
        check_padded(objective, vocab_size, tokens_per_microbatch)
        assert vocab_size is not None
        each = None if pad_to is None else -(-global_batch_size // (groups.dp_size * num_microbatches))
        shape = PaddedShape(vocab_size, multiple_of=multiple_of, pad_to=pad_to, num_pairs=each)
        builder = PaddedBatchBuilder(pairs, batch_layout, shape)
    else:
        _refuse_given("packed rows", vocab_size=vocab_size)
        _check_capacity(pairs, batch_layout, global_batch_size)
        builder = BatchBuilder(pairs, batch_layout)
    batches = iterate_batches(
        builder,
        pair_order(order, len(pairs), seed),
        batch_size=global_batch_size,
        total_pairs=len(pairs) if total_pairs is None else total_pairs,
        consumed_pairs=consumed_pairs,
        num_workers=num_workers,
    )
    return PreferenceBatches(batches, consumed_pairs=consumed_pairs, order=order)


def pairs_for(data: PairData, objective: Objective) -> PairCollection:
    """Pairs with what an objective reads beside them.

    Raises:
        ConfigError: it is no objective, or it compares with a reference, and there are no log-probs of one.
        DataError: a data set is missing, incomplete, empty, or without the responses or the columns that the objective reads.
    """
    check_objective(objective)
    pairs = open_pairs(data)
    named = f"objective {objective.name}"
    prepared = [store for store in pairs.stores if isinstance(store, PairStore)]
    check_needed(prepared, "data", objective.needs, named, lambda column: f"{named} or a weight of each pair")
    _check_in_memory([store for store in pairs.stores if isinstance(store, PairsInMemory)], objective)
    if objective.needs.mismatched and pairs.mismatched is None:
        pairs.match_anew()
    if objective.needs.reference and pairs.reference_scores is None:
        raise ConfigError(
            f"objective {objective.name} compares with a reference, and the data has no log-probs of one: "
            "give it some with megatron_rmipo.plugin.score_reference(model, pairs, objective, ...) first, where pairs is what "
            "open_pairs made of the data."
        )
    return pairs


def _check_in_memory(stores: Sequence[Any], objective: Objective) -> None:
    """Refuse pairs in memory without what an objective reads, as those on disk are."""
    needs = objective.needs
    for store in stores:
        if needs.columns:
            raise DataError(
                f"objective {objective.name} reads {' and '.join(needs.columns)} beside each pair, and {store.prefix} have no "
                "such numbers: prepare the data, from rows that have such a column."
            )
        there = store.lengths[:, 1:] > 0
        if needs.unpaired and (there.all(axis=1).any() != there.all() or not there.any(axis=0).all()):
            raise DataError(
                f"objective {objective.name} compares chosen with rejected responses, each with as much weight: {store.prefix} "
                "have to be pairs, or rows of one response each of both kinds."
            )
        read = store.lengths[:, 1:] if needs.rejected else store.lengths[:, 1:2]
        empty = np.flatnonzero((read == 0).all(axis=1) if needs.unpaired else (read == 0).any(axis=1))
        if empty.size:
            raise DataError(
                f"pair {empty[0]} of {store.prefix} lacks a response that objective {objective.name} reads ({empty.size} such "
                "pairs in all). Leave them out."
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {value!r}: it is {' or '.join(map(repr, choices))}.")


def _check_numbers(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"{name} {value}: it is at least {least}.")


def check_padded(objective: Objective, vocab_size: int | None, tokens_per_microbatch: int | None = None) -> None:
    """Refuse what padded rows cannot be.

    Raises:
        ConfigError: what, and the way out.
    """
    if vocab_size is None:
        raise ConfigError(
            "padded rows need vocab_size, the number of real ids: tensor parallelism pads the vocabulary, whose padding does not "
            "count."
        )
    if objective.needs.perturbation is not None:
        raise ConfigError(
            f"objective {objective.name} mixes the logits of a reference in memory with the policy's, from the hidden states of "
            "both, which padded rows do not give: attach the model and use packed rows."
        )
    _refuse_given("padded rows", tokens_per_microbatch=tokens_per_microbatch)


def _refuse_given(rows: str, **given: int | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} {value} says nothing of {rows}; leave it out.")


def _check_capacity(pairs: PairCollection, layout: BatchLayout, global_batch_size: int) -> None:
    """Refuse rows that a pair does not fit in, or that the mean step does not, so that some step would not."""
    tokens = layout.tokens_per_microbatch
    if tokens is None:
        return
    check_pairs_fit(pairs, layout, name="tokens_per_microbatch")
    assert layout.num_microbatches is not None
    total = sum(int(layout.gradient_tokens(lengths).sum()) for _, lengths in pairs.all_lengths())
    step = total / len(pairs) * min(global_batch_size, len(pairs))
    most = layout.num_microbatches * layout.dp_size * tokens
    if step > most:
        raise ConfigError(
            f"{layout.num_microbatches} micro-batches of at most {tokens} tokens on each of {layout.dp_size} data-parallel ranks "
            f"hold {most} tokens, and {global_batch_size} pairs take {step:.0f} on average. Give a step more micro-batches, more "
            "tokens for each, or fewer pairs."
        )
