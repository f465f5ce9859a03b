"""Which layers each pipeline stage holds, from the flags alone: Megatron's rules, in numbers that anybody may ask for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.unknown_flags import flag_of

_ACCOUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_CHUNKS = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


@dataclasses.dataclass(frozen=True)
class Split:
    """Layers over the stages of a pipeline.

    Attributes:
        parallel: the flags that split them so.
        stage_costs: of each stage, in layers: those it holds, on the last one the output layer, too.
    """

    parallel: ParallelConfig
    stage_costs: tuple[float, ...]

    @property
    def flags(self) -> str:
        """What to write; empty where an even split needs no flag."""
        return " ".join(_written(self.parallel, (*_ENDS, *_ACCOUNTS)))


def num_chunks(num_layers: int, parallel: ParallelConfig) -> int:
    """Chunks of layers that each stage holds: one, but in an interleaved pipeline."""
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        return parallel.num_virtual_stages_per_pipeline_rank
    each = parallel.num_layers_per_virtual_pipeline_stage
    return 1 if each is None else max(1, max(stage_slots(num_layers, parallel)) // each)


def stage_slots(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """For each stage how many layers it has room for, embedding and output layer among them where they count as one."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    others = stages - (first is not None) - (last is not None)
    middle = (_num_counted(num_layers, parallel) - (first or 0) - (last or 0)) // others if others else 0
    slots = [middle] * stages
    if first is not None:
        slots[0] = first
    if last is not None:
        slots[-1] = last
    return slots


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[range]]:
    """Layers by stage, by chunk, counted from 0.

    Args:
        num_layers: of the model.
        parallel: the flags, which :func:`split_problems` finds nothing wrong with.
    """
    chunks, slots = num_chunks(num_layers, parallel), stage_slots(num_layers, parallel)
    layers: list[list[range]] = [[] for _ in slots]
    start = 0
    for chunk in range(chunks):
        for stage, room in enumerate(slots):
            size = room // chunks
            if parallel.account_for_embedding_in_pipeline_split and chunk == stage == 0:
                size -= 1
            if parallel.account_for_loss_in_pipeline_split and (chunk, stage) == (chunks - 1, len(slots) - 1):
                size -= 1
            layers[stage].append(range(start, start + size))
            start += size
    return layers


def stage_shares(num_layers: int, parallel: ParallelConfig) -> tuple[tuple[float, ...], ...]:
    """The share of the layers that each stage holds, chunk by chunk."""
    stages = stage_layers(num_layers, parallel)
    return tuple(tuple(len(layers) / num_layers for layers in chunks) for chunks in stages)


def split_flags(parallel: ParallelConfig) -> list[str]:
    """The flags that are given beside the number of stages, as they are written."""
    return list(_written(parallel, (*_CHUNKS, *_ENDS, *_ACCOUNTS)))


def split_flag_problems(parallel: ParallelConfig) -> Iterator[str]:
    """Faults of the flags that show without knowing the model."""
    for name, least in ((_CHUNKS[0], 1), (_CHUNKS[1], 2), (_ENDS[0], 1), (_ENDS[1], 1)):
        value = getattr(parallel, name)
        if value is not None and value < least:
            yield f"{flag_of(name)} {value}: must be at least {least}"
    given = split_flags(parallel)
    if given and parallel.pipeline_model_parallel_size == 1:
        yield f"{', '.join(given)}: there is one pipeline stage; give --pipeline-model-parallel-size, or leave it out"
    ends, accounts = list(_written(parallel, _ENDS)), list(_written(parallel, _ACCOUNTS))
    if ends and accounts:
        yield f"{', '.join([*ends, *accounts])}: a number of layers and what counts as one exclude each other; give one kind"
    if ends and parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield f"{flag_of(_CHUNKS[0])} with {', '.join(ends)}: stages differ, so give a number of chunks, {flag_of(_CHUNKS[1])}"


def split_problems(num_layers: int, parallel: ParallelConfig) -> Iterator[str]:
    """What keeps the layers of a model from being split as the flags say, with flags that would work.

    Args:
        num_layers: of the model.
        parallel: the flags; what :func:`split_flag_problems` finds wrong with them is left to that.
    """
    if any(split_flag_problems(parallel)):
        return
    if fault := _fault(num_layers, parallel):
        tried = " ".join(_written(parallel, ("pipeline_model_parallel_size", *_ENDS, *_ACCOUNTS, *_CHUNKS)))
        yield f"{tried}: {fault}; would work: {_remedies(num_layers, parallel)}"


def best_split(num_layers: int, head: float, parallel: ParallelConfig) -> Split | None:
    """The split of a model's layers over as many stages, and chunks of them, whose slowest stage takes least.

    Of several that are as fast it is the one with the fewest flags, then the most even one. Where
    chunks are given by their layers, stages are alike.

    Args:
        num_layers: of the model.
        head: what the output layer costs, as so many layers.
        parallel: the flags; those of the split are left out of account.

    Returns:
        None where no flags split the layers over so many stages and chunks.
    """
    return min(_splits(num_layers, head, parallel), key=_order, default=None)


def _order(split: Split) -> tuple[float, int, float]:
    return round(max(split.stage_costs), 9), len(split.flags.split("--")), sum(cost**2 for cost in split.stage_costs)


def present_split(num_layers: int, head: float, parallel: ParallelConfig) -> Split:
    """The split that the flags say, which must be one."""
    sizes = stage_slots(num_layers, parallel)
    sizes[0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1] -= parallel.account_for_loss_in_pipeline_split
    return Split(parallel, tuple(size + head * (stage == len(sizes) - 1) for stage, size in enumerate(sizes)))


def _splits(num_layers: int, head: float, parallel: ParallelConfig) -> Iterator[Split]:
    """Every way to split the layers over as many stages and chunks."""
    bare = _replace(parallel, dict.fromkeys(_ENDS) | dict.fromkeys(_ACCOUNTS, False))
    chunks, stages = parallel.num_virtual_stages_per_pipeline_rank or 1, parallel.pipeline_model_parallel_size
    sizes: Sequence[int | None] = [None, *range(chunks, num_layers, chunks)]
    pairs = (pair for pair in itertools.product(sizes, sizes) if _comes_out(num_layers, stages, [one for one in pair if one]))
    counted = itertools.product((False, True), repeat=2)
    choices: list[dict[str, Any]] = [dict(zip(_ACCOUNTS, pair, strict=True)) for pair in counted]
    choices += [dict(zip(_ENDS, pair, strict=True)) for pair in pairs if any(pair)]
    for choice in choices:
        flags = _replace(bare, choice)
        if not any(split_flag_problems(flags)) and _fault(num_layers, flags) is None:
            yield present_split(num_layers, head, flags)


def _num_counted(num_layers: int, parallel: ParallelConfig) -> int:
    """Layers, and what counts as one."""
    return num_layers + parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split


def _comes_out(counted: int, stages: int, ends: Sequence[int]) -> bool:
    """Whether what is left of the layers beside given ``ends`` is a whole number of them for each other stage."""
    others, left = stages - len(ends), counted - sum(ends)
    return left >= 0 and (left > 0) == (others > 0) and not (others and left % others)


def _fault(num_layers: int, parallel: ParallelConfig) -> str | None:
    """Why layers cannot be split so, or None."""
    stages, counted = parallel.pipeline_model_parallel_size, _num_counted(num_layers, parallel)
    ends = [size for size in (getattr(parallel, name) for name in _ENDS) if size is not None]
    others, left = stages - len(ends), counted - sum(ends)
    layers = f"{num_layers} layers" + (f" with {counted - num_layers} more counted" if counted > num_layers else "")
    if not _comes_out(counted, stages, ends):
        rest = f", of which {left} are left for {others} stages," if ends else ""
        return f"the model's {layers}{rest} do not come out even over {stages} stages"
    slots = stage_slots(num_layers, parallel)
    each, chunks = parallel.num_layers_per_virtual_pipeline_stage, num_chunks(num_layers, parallel)
    if each is not None and slots[0] % each:
        return f"the {slots[0]} layers of a stage are no multiple of {each}"
    if each is not None and chunks == 1:
        return f"the {slots[0]} layers of a stage would be one chunk, and nothing interleaved"
    if chunks > 1 and others == 0:
        # Megatron-Core would divide by their number.
        return "in an interleaved pipeline there must be stages between the first and the last where the layers of both are given"
    if uneven := [slot for slot in slots if slot % chunks]:
        return f"a stage's {uneven[0]} layers are no multiple of {chunks} chunks"
    return None


def _remedies(num_layers: int, parallel: ParallelConfig) -> str:
    """Flags with as many stages and chunks; without such, with as many stages; then numbers of stages that divide the layers."""
    found = best_split(num_layers, 0.0, parallel)
    if found is None:
        found = best_split(num_layers, 0.0, _replace(parallel, dict.fromkeys(_CHUNKS)))
    names = ("pipeline_model_parallel_size", *_ENDS, *_ACCOUNTS, *_CHUNKS)
    texts = [] if found is None else [" ".join(_written(found.parallel, names))]
    divisors = [str(stages) for stages in range(1, num_layers + 1) if num_layers % stages == 0]
    without = "without these flags " if split_flags(parallel) else ""
    return ", or ".join([*texts, f"{without}--pipeline-model-parallel-size {', '.join(divisors)}"])


def _replace(parallel: ParallelConfig, fields: Mapping[str, Any]) -> ParallelConfig:
    return dataclasses.replace(parallel, **fields)


def _written(parallel: ParallelConfig, names: Sequence[str]) -> Iterator[str]:
    """Those of some flags that are given, as they are written."""
    for name in names:
        value = getattr(parallel, name)
        if value is not None and value is not False:
            yield flag_of(name) if value is True else f"{flag_of(name)} {value}"
