"""Rows, packed or padded, through Megatron's pipeline schedules, as micro-batches.

Every function here is collective: all ranks of the run call it together, each with its own data-parallel share. Results exist on
the last pipeline stage, where the scores are made.

Shape letters: N scored tokens, P pairs of the global batch, R responses of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rmipo.data.batches.packing import PackedRow
from megatron_rmipo.data.batches.padding import PaddedRows, Row
from megatron_rmipo.memory.readings import PackOutOfMemory, is_out_of_memory
from megatron_rmipo.model.layers.activation_offloading import begin_gradient_pass
from megatron_rmipo.model.logprobs import ReferenceHead, vocab_parallel_logprobs
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.model.vocabulary_shard import TokenChoice
from megatron_rmipo.passes.interleaving import messages_in_order
from megatron_rmipo.passes.row_problems import check_lengths
from megatron_rmipo.runtime.groups import ProcessGroups, current_device
from megatron_rmipo.runtime.transfers import to_device

# The attention reads the segments on the CPU.
_ON_DEVICE = ("token_ids", "position_ids", "source", "target", "lengths", "pair_numbers", "branches")


def run_rows(
    model: Chunks,
    rows: Sequence[Row],
    finish: Callable[[Row, Tensor], Any],
    *,
    name: str,
    backward: bool,
    references: Sequence[ReferenceHead] = (),
    scores: bool = True,
    choice: TokenChoice | None = None,
) -> list[Any]:
    """Run rows as micro-batches.

    Args:
        model: this rank's stage of the model, or its chunks.
        rows: at least one; the same number on all stages of a replica.
        finish: called on the last stage with each row, on the device, and the model's output for it. With ``backward`` it
            returns what Megatron takes: (loss to sum, number of pairs as an int tensor, what to report).
        name: of the pass, for messages.
        backward: run the backward pass, too.
        references: on the last stage, a reference for each row: outputs are ``[4, N]`` then.
        scores: False gives the last stage's hidden states ``[N, H]`` to ``finish`` instead of log-probs ``[N]``.
        choice: gives ``finish`` the ids of next tokens, int64 ``[N]``, chosen behind the sources, instead.

    Returns:
        What ``finish`` gave for each row (with ``backward``, what it said to report); empty but on the last stage.

    Raises:
        ConfigError: the model's pipeline takes rows of one length alone.
        PackOutOfMemory: memory ran out, on this rank alone.
    """
    chunks = chunks_of(model)
    check_lengths(chunks, rows)
    if backward:
        begin_gradient_pass(unwrapped(chunks[0]))
    begun: list[tuple[int, bool]] = []  # forwards and backwards so far: number of the row, whether it is its backward

    def forward_step(
        iterator: Iterator[tuple[int, tuple[Row, ReferenceHead | None]]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        number, (row, reference) = next(iterator)
        begun.append((number, False))
        row = on_device(row)
        output: Any = row_output(model, row, reference, scores=scores, choice=choice)
        if output.requires_grad:
            # A pipeline stage before the last runs other packs' forwards before a pack's backward.
            output.register_hook(lambda grad: begun.append((number, True)))
        return output, partial(finish, row) if backward else partial(_keep, finish, row)

    numbered = list(enumerate(zip(*_in_groups(chunks, rows, references), strict=True)))
    try:
        outputs: list[Any] = _schedule(chunks)(
            forward_step_func=forward_step,
            data_iterator=[iter(numbered) for _ in chunks],
            model=chunks,
            num_microbatches=len(numbered),
            # Shapes travel with the activations where they vary; padded rows may all be of this one.
            seq_length=rows[0].token_ids.shape[-1],
            micro_batch_size=rows[0].num_tokens // rows[0].token_ids.shape[-1],
            forward_only=not backward,
            collect_non_loss_data=not backward,
            **messages_in_order(chunks),
        )
    except RuntimeError as error:
        if not (begun and is_out_of_memory(error)):
            raise
        number, in_backward = begun[-1]
        # What fills a group up is the first row once more.
        number = number if number < len(rows) else 0
        raise PackOutOfMemory(name, rows, number, backward=backward, in_backward=in_backward, mixed=bool(references)) from error
    return outputs[: len(rows)]


def _schedule(chunks: Sequence[torch.nn.Module]) -> Any:
    """Megatron's schedule for a pipeline of such chunks: a reference may have another number of them than the policy."""
    num_stages = unwrapped(chunks[0]).config.pipeline_model_parallel_size
    return get_forward_backward_func(num_stages, len(chunks) if len(chunks) > 1 else None)


def _in_groups(
    chunks: Sequence[torch.nn.Module], rows: Sequence[Row], references: Sequence[ReferenceHead]
) -> tuple[Sequence[Row], Sequence[ReferenceHead | None]]:
    """The rows and their references as many as a schedule takes: an interleaved one runs groups of one for each stage."""
    size = unwrapped(chunks[0]).config.pipeline_model_parallel_size if len(chunks) > 1 else 1
    # What fills a group up counts nowhere.
    filler = dataclasses.replace(rows[0], pair_numbers=torch.full_like(rows[0].pair_numbers, -1))
    fillers = -len(rows) % size
    known: list[ReferenceHead | None] = [*references] or [None] * len(rows)
    return [*rows, *[filler] * fillers], known + known[:1] * fillers


def on_device(row: Row) -> Row:
    """A row with what model, sums and losses read of it on this rank's device, all in one copy."""
    if current_device().type == "cpu":
        return row
    parts = [getattr(row, name) for name in _ON_DEVICE]
    moved = torch.split(to_device(torch.cat([part.flatten() for part in parts])), [part.numel() for part in parts])
    fields: dict[str, Any] = {name: one.view_as(part) for name, one, part in zip(_ON_DEVICE, moved, parts, strict=True)}
    return dataclasses.replace(row, **fields)


def row_output(
    model: torch.nn.Module,
    row: Row,
    reference: ReferenceHead | None = None,
    *,
    scores: bool = True,
    choice: TokenChoice | None = None,
) -> Tensor:
    """What a stage of a model gives for a row on its device: on the last one log-probs of the scored tokens, fp32 ``[N]``.

    A packed row goes through :func:`megatron_rmipo.model.packed_model.score_row`, which also knows references, hidden states and
    next tokens. Padded rows go through the model as its owner calls it, ``model(tokens, position_ids, attention_mask=None)``: it
    gives logits ``[B, S, V_padded / tp]`` of its part of the vocabulary.
    """
    if isinstance(row, PaddedRows):
        assert reference is None
        assert scores
        assert choice is None
        return _padded_output(model, row)
    extra: dict[str, Any] = {} if reference is None else {"reference": reference}
    if choice is not None:
        extra["choice"] = choice.at(zip(row.pair_numbers.tolist(), row.position_ids[row.source].tolist(), strict=True))
    if row.num_alone_scored:
        extra["num_ungraded"] = row.num_alone_scored
    if getattr(model.config, "num_moe_experts", None):
        extra["uncounted"] = _uncounted(row)
    output: Tensor = model(
        token_ids=row.token_ids,
        position_ids=row.position_ids,
        segments=row.segments,
        source=row.source,
        target=row.target if scores and choice is None else None,
        **extra,
    )
    return output


def _padded_output(model: torch.nn.Module, rows: PaddedRows) -> Tensor:
    output: Tensor = model(rows.token_ids, rows.position_ids, attention_mask=None)
    inner = unwrapped(model)
    # Megatron's schedules know stages by this name.
    if not getattr(inner, "post_process", True):
        return output
    scored = output.flatten(0, 1).index_select(0, rows.source)
    groups = getattr(inner, "pg_collection", None) or ProcessGroups.of_megatron()
    return vocab_parallel_logprobs(scored, rows.target, groups.tp, vocab_size=rows.vocab_size)


def _uncounted(row: PackedRow) -> Tensor:
    """Which tokens of a row train nothing: padding, responses alone, and all of a filler; bool ``[T]`` on the row's device."""
    places = torch.arange(row.num_tokens, device=row.token_ids.device)
    return (places >= row.num_tokens - row.num_padding - row.num_alone_tokens) | (row.pair_numbers < 0).all()


def _keep(finish: Callable[[Row, Tensor], Any], row: Row, output: Tensor, non_loss_data: bool) -> Any:
    return finish(row, output)


def response_sums(logprobs: Tensor, row: Row) -> Tensor:
    """Sums of log-probs per response, fp32 ``[..., R]``, from ``[..., N]`` log-probs of a row's scored tokens, on one device.

    Summed in float64 in a fixed order: sums near -5000 keep their digits, and two runs agree to the bit.
    """
    wide = logprobs.to(torch.float64)
    if wide.dim() == 1:
        return torch.segment_reduce(wide, "sum", lengths=row.lengths, unsafe=True).to(torch.float32)
    return torch.stack([response_sums(one, row) for one in logprobs])


def score_responses(model: Chunks, rows: Sequence[Row], num_pairs: int, *, name: str = "scoring pass") -> Tensor:
    """Log-probs of every response of this rank's rows, forward only.

    Args:
        model: this rank's stage of the model, or its chunks.
        rows: at least one; the same number on all stages of a replica.
        num_pairs: P.
        name: of the pass, for messages.

    Returns:
        fp32 ``[P, 2, 2]`` on the device: (sum, scored tokens) of (chosen, rejected) by pair of the global batch; zero for pairs
        of other ranks, and everywhere but on the last stage. Where the same responses stand alone in a row, too, those do not
        count.
    """
    # One place more at the end, where a filler's number, -1, writes: leaving fillers out would make the host wait.
    scores = torch.zeros(num_pairs + 1, 2, 2, device=current_device())
    sums_of = lambda row, logprobs: (row, response_sums(logprobs, row))  # noqa: E731
    for row, sums in run_rows(model, rows, sums_of, name=name, backward=False):
        own = slice(row.num_responses - row.num_alone)
        scores[row.pair_numbers[own], row.branches[own]] = torch.stack([sums, row.lengths.to(torch.float32)], dim=1)[own]
    return scores[:num_pairs]


def gather_pairs(table: Tensor, groups: ProcessGroups) -> Tensor:
    """Put together what the data-parallel ranks of a stage know of their own pairs (zero elsewhere). From the device to the CPU.

    Each pair is one rank's, so the sum is that rank's value to the bit, whatever the layout. All ranks of a stage call it
    together, and wait for all work on the device.
    """
    table = table.contiguous()
    dist.all_reduce(table, group=groups.dp)
    return table.cpu()


def from_last_stage(value: Any, groups: ProcessGroups) -> Any:
    """What the last pipeline stage holds, on every stage. All ranks of a pipeline call it together."""
    payload = [value]
    if groups.pp_size > 1:
        source = dist.get_global_rank(groups.pp, groups.pp_size - 1)
        dist.broadcast_object_list(payload, src=source, group=groups.pp, device=current_device())
    return payload[0]


def scores_everywhere(
    model: Chunks, rows: Sequence[Row], num_pairs: int, groups: ProcessGroups, *, name: str = "scoring pass"
) -> Tensor:
    """What :func:`score_responses` finds, of all data-parallel ranks, on every rank of the run; on the CPU."""
    scores = score_responses(model, rows, num_pairs, name=name)
    if groups.is_last_stage:
        scores = gather_pairs(scores, groups)
    found: Tensor = from_last_stage(scores, groups)
    return found
