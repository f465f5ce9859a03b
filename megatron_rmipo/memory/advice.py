"""Which flags would have let a pack fit, by the estimate of :mod:`megatron_rmipo.memory.estimate`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_rmipo.config.flag_problems import config_problems
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.estimate import PackMemory, pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.shares import data_parallel_size
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.problems.layout import layout_problems, machine_problems

# Packs of other sizes leave gaps between them: of what is free, this much is taken as usable.
USABLE_SHARE = 0.95
SMALL_CHUNK = 1024
# Packs that are suggested hold a multiple of this.
ROUND_TOKENS = 64
# A measure that makes packs possible that are larger by less is not worth naming.
WORTHWHILE = 1.1
MAX_SUGGESTIONS = 3
# Of the adapter that is suggested in the place of training all weights.
SUGGESTED_RANK = 16
# Of the work that failed: it has none, it has one, or it has one of which a checkpoint holds the state, in the form of its kind.
Optimizer = Literal["none", "unsaved", "saved"]


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A pack that did not fit.

    Attributes:
        pack: its size.
        backward: whether its pass has a backward.
        capacity_factor: tokens of a full pack of its pass, in ``--tokens-per-microbatch``.
        free_bytes: what there was for it.
        kind: ``stage``, ``num_microbatches``, ``mixed``, ``fused`` of :func:`megatron_rmipo.memory.estimate.pack_memory`.
        optimizer: what is to be known of it.
    """

    pack: PackSize
    backward: bool
    capacity_factor: int
    free_bytes: float
    kind: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = "unsaved"

    def estimate(self, arch: ModelArchitecture, config: Config, pack: PackSize | None = None) -> PackMemory:
        """What the pack, or another one of its pass, needs with some flags."""
        return pack_memory(arch, config, pack or self.pack, backward=self.backward, **self.kind)

    @property
    def stage(self) -> int:
        """The pipeline stage of the rank."""
        stage: int = self.kind.get("stage", 0)
        return stage


_SECTIONS = ("model", "parallel", "memory", "lora")


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Flags that make what a pack needs smaller, or what stands beside it; nothing: those of the run."""

    flags: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def trains_less(self) -> bool:
        """Whether it changes what is trained."""
        return bool(self.lora)

    def __add__(self, other: _Measure) -> _Measure:
        flags = f"{self.flags} {other.flags}".strip()
        sections = ({**getattr(self, name), **getattr(other, name)} for name in _SECTIONS)
        return _Measure(flags, *sections)

    def apply(self, config: Config) -> Config:
        changed: dict[str, Any] = {name: dataclasses.replace(getattr(config, name), **getattr(self, name)) for name in _SECTIONS}
        return dataclasses.replace(config, **changed)


def suggestions(arch: ModelArchitecture, config: Config, world_size: int, shortage: Shortage, least_tokens: int) -> list[str]:
    """Flags with which the pass would have fitted, each line enough by itself; the gentlest first.

    Smaller packs come first, where the largest pair of the data then fits; besides, or else, other flags.

    Args:
        arch: the model.
        config: the flags of the run.
        world_size: all ranks.
        shortage: what did not fit.
        least_tokens: the smallest ``--tokens-per-microbatch`` that the data allows.

    Returns:
        At most three; none where nothing fits on these ranks.
    """
    largest = functools.partial(_largest_tokens, arch, config, world_size, shortage)
    now, own = config.data.tokens_per_microbatch, largest(_Measure())
    lines = [_tokens_flag(own, least_tokens)] if least_tokens <= own < now else []
    has_head = shortage.stage == config.parallel.pipeline_model_parallel_size - 1
    measures = list(
        _measures(arch, config, world_size, shortage.optimizer, backward=shortage.backward, head=has_head, packs=True)
    )
    others = [measure for measure in measures if not measure.trains_less]
    last = [measure for measure in measures if measure.trains_less]
    for measure in [*others, *_together(arch, config, world_size, others), *last]:
        tokens = largest(measure)
        if tokens >= min(max(least_tokens, WORTHWHILE * own), now):
            lines.append(measure.flags + (f" {_tokens_flag(tokens, least_tokens)}" if tokens < now else ""))
    return lines[:MAX_SUGGESTIONS]


def update_suggestions(
    arch: ModelArchitecture, config: Config, world_size: int, stage: int = 0, optimizer: Optimizer = "unsaved"
) -> list[str]:
    """Flags that make smaller what weights, gradients and optimizer hold, with their bytes on a rank; no pack is at fault."""
    measures = _measures(arch, config, world_size, optimizer, backward=False, head=False, packs=False)
    total = {one.flags: _standing(arch, one.apply(config), world_size, stage, optimizer) for one in measures}
    now = _standing(arch, config, world_size, stage, optimizer)
    return [f"{flags} ({number / 2**30:.2f} of {now / 2**30:.2f} GiB)" for flags, number in total.items() if number < now]


def _largest_tokens(arch: ModelArchitecture, config: Config, world_size: int, shortage: Shortage, measure: _Measure) -> int:
    """The largest ``--tokens-per-microbatch`` of which a full pack fits, at most the present one; 0 if none does."""
    changed = measure.apply(config)
    standing = [_standing(arch, one, world_size, shortage.stage, shortage.optimizer) for one in (config, changed)]
    free = shortage.free_bytes + standing[0] - standing[1]
    # The pack did not fit, whatever its estimate: one that says it would have is raised.
    error = max(1.0, shortage.free_bytes / max(shortage.estimate(arch, config).peak, 1.0))

    def fits(tokens: int) -> bool:
        pack = shortage.pack.scaled(tokens * shortage.capacity_factor)
        return error * shortage.estimate(arch, changed, pack).peak <= USABLE_SHARE * free

    low, high = 0, config.data.tokens_per_microbatch + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _standing(arch: ModelArchitecture, config: Config, world_size: int, stage: int, optimizer: Optimizer) -> float:
    return standing_memory(arch, config, world_size, stage, trains=optimizer != "none").total


def _tokens_flag(tokens: int, least: int) -> str:
    return f"--tokens-per-microbatch {max(tokens // ROUND_TOKENS * ROUND_TOKENS, least)}"


def _measures(
    arch: ModelArchitecture,
    config: Config,
    world_size: int,
    optimizer: Optimizer,
    *,
    backward: bool,
    head: bool,
    packs: bool,
) -> Iterator[_Measure]:
    """One at a time, those that cost least speed first; the ones that cost the optimizer's saved state last.

    Those that the run would be refused with are left out.
    """
    accepted = functools.partial(_is_accepted, arch, config, world_size)
    if head and config.model.logprob_chunk_size > SMALL_CHUNK:
        yield _Measure(f"--logprob-chunk-size {SMALL_CHUNK}", model={"logprob_chunk_size": SMALL_CHUNK})
    replicas = data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    shards = [_Measure("--use-distributed-optimizer", parallel={"use_distributed_optimizer": True})]
    shards = shards if replicas > 1 and not config.parallel.use_distributed_optimizer else []
    if optimizer == "unsaved":
        yield from filter(accepted, shards)
    if backward:
        yield from filter(accepted, _recomputation(config))
    yield from filter(accepted, _larger_groups(arch, config, world_size, packs=packs))
    if optimizer != "none":
        # Whatever a checkpoint's state was kept in, they go on with it.
        yield from filter(accepted, _smaller_states(config))
    if optimizer == "unsaved" and not config.lora.is_on:
        # It trains something else: after all that do not.
        yield from filter(accepted, _adapter(arch))
    if optimizer == "saved":
        yield from (dataclasses.replace(one, flags=f"{one.flags} --no-load-optim") for one in shards if accepted(one))


def _recomputation(config: Config) -> Iterator[_Measure]:
    granularity = config.model.recompute_granularity
    if granularity is None:
        yield _Measure("--recompute-granularity selective", model={"recompute_granularity": "selective"})
    if granularity != "full":
        yield _Measure(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        )


def _larger_groups(arch: ModelArchitecture, config: Config, world_size: int, *, packs: bool) -> Iterator[_Measure]:
    """Of each kind of parallelism the next size that the run would be accepted with; of context parallelism for packs alone."""
    most = {
        "expert_model_parallel_size": arch.experts.num_experts if arch.experts else 1,
        "tensor_model_parallel_size": arch.num_attention_heads,
        "context_parallel_size": world_size if packs else 1,
    }
    for name, limit in most.items():
        sizes = range(getattr(config.parallel, name) + 1, min(limit, world_size) + 1)
        larger = (_larger_group(name, size) for size in sizes if world_size % size == 0)
        yield from itertools.islice((one for one in larger if _is_accepted(arch, config, world_size, one)), 1)


def _larger_group(name: str, size: int) -> _Measure:
    tensor = name == "tensor_model_parallel_size"
    flags = f"--{name.replace('_', '-')} {size}{' --sequence-parallel' if tensor else ''}"
    return _Measure(flags, parallel={name: size, **({"sequence_parallel": True} if tensor else {})})


def _smaller_states(config: Config) -> Iterator[_Measure]:
    """The optimizer's state in fewer digits, or on the host."""
    memory = config.memory
    precise = memory.use_precision_aware_optimizer
    if not precise:
        yield _Measure(
            "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            memory={"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
        )
    if not memory.optimizer_cpu_offload:
        # It needs the other's code.
        flags = "--optimizer-cpu-offload" if precise else "--use-precision-aware-optimizer --optimizer-cpu-offload"
        yield _Measure(flags, memory={"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True})


def _adapter(arch: ModelArchitecture) -> Iterator[_Measure]:
    """An adapter in the place of all weights, where the model can have one."""
    measure = _Measure(f"--lora-rank {SUGGESTED_RANK}", lora={"lora_rank": SUGGESTED_RANK})
    with contextlib.suppress(ConfigError):
        plan_of_flags(arch, measure.apply(Config()).lora)
        yield measure


def _is_accepted(arch: ModelArchitecture, config: Config, world_size: int, measure: _Measure) -> bool:
    """Whether a run that was accepted would be with a measure, too."""

    def problems(flags: Config) -> set[str]:
        return {*config_problems(flags), *machine_problems(flags), *layout_problems(flags, arch, world_size)}

    changed = measure.apply(config)
    parallel = changed.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return world_size % ranks == 0 and problems(changed) <= problems(config)


def _together(arch: ModelArchitecture, config: Config, world_size: int, measures: list[_Measure]) -> list[_Measure]:
    """All of them that are accepted as one, without the selective recomputation that the full one replaces."""
    chosen = _Measure()
    for measure in measures:
        if "selective" not in measure.flags and _is_accepted(arch, config, world_size, chosen + measure):
            chosen += measure
    return [chosen] if chosen.flags and chosen.flags not in {one.flags for one in measures} else []
