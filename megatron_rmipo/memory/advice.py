"""Which flags would have let a pack fit, by the estimate of :mod:`megatron_rmipo.memory.estimate`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_rmipo.config.parallel_flags import ParallelConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.estimate import PackMemory, PackSize, pack_memory, standing_memory
from megatron_rmipo.model.expert_problems import expert_tensor_size
from megatron_rmipo.model.transformer_engine import fp8_width_problems

# Packs of other sizes leave gaps between them: of what is free, this much is taken as usable.
USABLE_SHARE = 0.95
SMALL_CHUNK = 1024
# Packs that are suggested hold a multiple of this.
ROUND_TOKENS = 64
# A measure that makes packs possible that are larger by less is not worth naming.
WORTHWHILE = 1.1
MAX_SUGGESTIONS = 3
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
        kind: ``packs_in_flight``, ``mixed``, ``fused``, ``last_stage`` of
            :func:`megatron_rmipo.memory.estimate.pack_memory`.
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


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Flags that make what a pack needs smaller, or what stands beside it; nothing: those of the run."""

    flags: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __add__(self, other: _Measure) -> _Measure:
        return _Measure(f"{self.flags} {other.flags}".strip(), {**self.model, **other.model}, {**self.parallel, **other.parallel})

    def apply(self, config: Config) -> Config:
        model, parallel = dataclasses.replace(config.model, **self.model), dataclasses.replace(config.parallel, **self.parallel)
        return dataclasses.replace(config, model=model, parallel=parallel)


def suggestions(arch: ModelArchitecture, config: Config, dp_size: int, shortage: Shortage, least_tokens: int) -> list[str]:
    """Flags with which the pass would have fitted, each line enough by itself; the gentlest first.

    Smaller packs come first, where the largest pair of the data then fits; besides, or else, other flags.

    Args:
        arch: the model.
        config: the flags of the run.
        dp_size: data-parallel ranks.
        shortage: what did not fit.
        least_tokens: the smallest ``--tokens-per-microbatch`` that the data allows.

    Returns:
        At most three; none where nothing fits on these ranks.
    """
    largest = functools.partial(_largest_tokens, arch, config, dp_size, shortage)
    now, own = config.data.tokens_per_microbatch, largest(_Measure())
    lines = [_tokens_flag(own, least_tokens)] if least_tokens <= own < now else []
    has_head = shortage.kind.get("last_stage", True)
    measures = list(_measures(arch, config, dp_size, shortage.optimizer, backward=shortage.backward, head=has_head))
    for measure in [*measures, *_together(measures)]:
        tokens = largest(measure)
        if tokens >= min(max(least_tokens, WORTHWHILE * own), now):
            lines.append(measure.flags + (f" {_tokens_flag(tokens, least_tokens)}" if tokens < now else ""))
    return lines[:MAX_SUGGESTIONS]


def update_suggestions(arch: ModelArchitecture, config: Config, dp_size: int, optimizer: Optimizer = "unsaved") -> list[str]:
    """Flags that make smaller what weights, gradients and optimizer hold, with their bytes on a rank; no pack is at fault."""
    measures = _measures(arch, config, dp_size, optimizer, backward=False, head=False)
    total = {one.flags: _standing(arch, one.apply(config), config, dp_size, optimizer) for one in measures}
    now = _standing(arch, config, config, dp_size, optimizer)
    return [f"{flags} ({number / 2**30:.2f} of {now / 2**30:.2f} GiB)" for flags, number in total.items() if number < now]


def _largest_tokens(arch: ModelArchitecture, config: Config, dp_size: int, shortage: Shortage, measure: _Measure) -> int:
    """The largest ``--tokens-per-microbatch`` of which a full pack fits, at most the present one; 0 if none does."""
    changed = measure.apply(config)
    standing = [_standing(arch, one, config, dp_size, shortage.optimizer) for one in (config, changed)]
    free = shortage.free_bytes + standing[0] - standing[1]
    # The pack did not fit, whatever its estimate: one that says it would have is raised.
    error = max(1.0, shortage.free_bytes / max(shortage.estimate(arch, config).peak, 1.0))
    scored_share = shortage.pack.num_scored / max(shortage.pack.num_tokens, 1)

    def fits(tokens: int) -> bool:
        num_tokens = tokens * shortage.capacity_factor
        pack = PackSize(num_tokens, math.ceil(scored_share * num_tokens))
        return error * shortage.estimate(arch, changed, pack).peak <= USABLE_SHARE * free

    low, high = 0, config.data.tokens_per_microbatch + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _standing(arch: ModelArchitecture, changed: Config, config: Config, dp_size: int, optimizer: Optimizer) -> float:
    """What stands on a rank with changed flags; a larger tensor-parallel size takes its ranks from data parallelism."""
    tensor = changed.parallel.tensor_model_parallel_size
    ranks = config.parallel.tensor_model_parallel_size * dp_size
    return standing_memory(arch, changed, ranks // tensor, trains=optimizer != "none").total


def _tokens_flag(tokens: int, least: int) -> str:
    return f"--tokens-per-microbatch {max(tokens // ROUND_TOKENS * ROUND_TOKENS, least)}"


def _measures(
    arch: ModelArchitecture, config: Config, dp_size: int, optimizer: Optimizer, *, backward: bool, head: bool
) -> Iterator[_Measure]:
    """One at a time, those that cost least speed first; the one that costs the optimizer's saved state last."""
    if head and config.model.logprob_chunk_size > SMALL_CHUNK:
        yield _Measure(f"--logprob-chunk-size {SMALL_CHUNK}", model={"logprob_chunk_size": SMALL_CHUNK})
    shards = {"use_distributed_optimizer": True} if dp_size > 1 and not config.parallel.use_distributed_optimizer else {}
    if shards and optimizer == "unsaved":
        yield _Measure("--use-distributed-optimizer", parallel=shards)
    granularity = config.model.recompute_granularity
    if backward and granularity is None:
        yield _Measure("--recompute-granularity selective", model={"recompute_granularity": "selective"})
    if backward and granularity != "full":
        yield _Measure(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        )
    ranks = config.parallel.tensor_model_parallel_size * dp_size
    shared = math.gcd(arch.num_attention_heads, arch.num_query_groups, *arch.mlp_widths, ranks)
    divisors = [size for size in range(config.parallel.tensor_model_parallel_size + 1, shared + 1) if shared % size == 0]
    larger = [
        size
        for size in divisors
        if not any(fp8_width_problems(config.model, arch, size))
        and _experts_fit(arch, config.parallel, ranks, tensor_model_parallel_size=size)
    ]
    present = config.parallel.expert_model_parallel_size
    numbers = range(present + 1, arch.experts.num_experts + 1) if arch.experts else range(0)
    fitting = (size for size in numbers if _experts_fit(arch, config.parallel, ranks, expert_model_parallel_size=size))
    wider = next(fitting, None)
    if wider is not None:
        yield _Measure(f"--expert-model-parallel-size {wider}", parallel={"expert_model_parallel_size": wider})
    if larger:
        yield _Measure(
            f"--tensor-model-parallel-size {larger[0]} --sequence-parallel",
            parallel={"tensor_model_parallel_size": larger[0], "sequence_parallel": True},
        )
    if shards and optimizer == "saved":
        yield _Measure("--use-distributed-optimizer --no-load-optim", parallel=shards)


def _experts_fit(arch: ModelArchitecture, parallel: ParallelConfig, ranks: int, **changes: Any) -> bool:
    """Whether the experts can be spread over the tensor- and data-parallel ranks of a stage, with changed flags."""
    parallel = dataclasses.replace(parallel, **changes)
    size, shards = parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    experts = arch.experts
    return experts is None or not (experts.num_experts % size or experts.ffn_hidden_size % shards or ranks % (size * shards))


def _together(measures: list[_Measure]) -> list[_Measure]:
    """All of them as one, without the selective recomputation that the full one replaces."""
    chosen = [measure for measure in measures if "selective" not in measure.flags]
    return [functools.reduce(_Measure.__add__, chosen)] if len(chosen) > 1 else []
