"""The best layout of a model on some machines, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.stages import StageMemory
from megatron_rmipo.planning.fit import GIB, named_parts, rank_memory
from megatron_rmipo.planning.hardware import Cluster
from megatron_rmipo.planning.layouts import layouts, pack_sizes, problems, with_packs
from megatron_rmipo.planning.short_numbers import figure
from megatron_rmipo.planning.sizes import Sizes
from megatron_rmipo.planning.step_time import StepSeconds, step_seconds
from megatron_rmipo.planning.workload import Workload, Workloads

# Layouts that take as long as the best but for this are as good: the simplest of them is suggested.
AS_GOOD = 1.01
# Layouts that take longer than the best by more are not told of.
MATTERS = 1.5
# More machines that are looked at where a model fits nowhere.
MOST_GPUS = 8192


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a layout needs and takes.

    Attributes:
        config: its flags.
        cluster: the machines.
        sizes: its ranks.
        memory: of the rank that needs most.
        load: of a step.
        step: seconds of it; None where it does not fit.
    """

    config: Config
    cluster: Cluster
    sizes: Sizes
    memory: StageMemory
    load: Workload
    step: StepSeconds | None

    @property
    def fits(self) -> bool:
        """Whether its rank that needs most has the memory."""
        return self.memory.peak <= self.cluster.usable_bytes

    @property
    def seconds(self) -> float:
        """Of a step."""
        assert self.step is not None
        return self.step.total

    @property
    def shape(self) -> Sizes:
        """Its ranks, in whatever chunks."""
        return dataclasses.replace(self.sizes, chunks=1)

    @property
    def name(self) -> str:
        """The layout in short."""
        model = self.config.model
        recomputation = {None: "", "selective": ", attention recomputed", "full": ", layers recomputed"}[
            model.recompute_granularity
        ]
        exchanged = ", heads exchanged" if self.config.parallel.cp_comm_type == "a2a" else ""
        return f"{self.sizes}{exchanged}, packs of {self.config.data.tokens_per_microbatch}{recomputation}"

    @property
    def memory_line(self) -> str:
        """What of its memory a rank needs."""
        stage = f" on stage {self.memory.stage}" if self.sizes.pp > 1 else ""
        needed, usable = figure(self.memory.peak / GIB), figure(self.cluster.usable_bytes / GIB)
        return f"{needed} of {usable} GiB a rank{stage}: {named_parts(self.memory)}"


class Planner:
    """Estimates layouts of one model and data.

    Args:
        arch: the model.
        base: the flags that stand whatever the layout.
        loads: what steps compute.
    """

    def __init__(self, arch: ModelArchitecture, base: Config, loads: Workloads) -> None:
        self.arch, self.base, self.loads = arch, base, loads
        self._scored_share, self._head_share = loads.scored_share(base), loads.head_share(base)

    def estimate(self, config: Config, cluster: Cluster, *, timed: bool = True) -> Estimate:
        """What a layout that the model can have needs, and where it fits or ``timed`` says so how long a step takes."""
        sizes = Sizes.of(config.parallel, self.arch.num_layers, cluster.gpus)
        load, needs = self.loads.of(config, sizes.dp), self.loads.needs
        memory = rank_memory(
            self.arch,
            config,
            cluster.gpus,
            num_scored=round(self._scored_share * config.data.tokens_per_microbatch),
            num_packs=load.num_packs,
            mixed=needs.perturbation is not None,
            passes_before=needs.unconditional is not None,
        )
        step = step_seconds(self.arch, config, cluster, load) if timed else None
        return Estimate(config, cluster, sizes, memory, load, step)

    def candidates(self, cluster: Cluster) -> Iterator[Estimate]:
        """Every layout that may be worth its time, without it; of one that fits in no way, the way that needs least.

        Larger packs, and more recomputation for their sake, are worth it where a step then has fewer packs. Experts cross nodes
        only where they do not fit into one.
        """
        least = max(self.loads.largest_pair(self.base), self.base.data.seq_length)
        within: set[ParallelConfig] = set()
        head = self._head_share * self.arch.num_layers
        by_layout = itertools.groupby(layouts(self.base, self.arch, cluster, least, head), key=lambda config: config.parallel)
        for parallel, ways in by_layout:
            sizes = Sizes.of(parallel, self.arch.num_layers, cluster.gpus)
            same = dataclasses.replace(parallel, expert_model_parallel_size=1)
            if same in within and sizes.ep * sizes.etp > cluster.gpus_per_node:
                continue
            found = list(self._ways(list(ways), least, sizes, cluster))
            fitting = [one for one in found if one.fits]
            if fitting:
                within.add(same)
            yield from fitting or [min(found, key=lambda one: one.memory.peak)]

    def _ways(self, ways: Sequence[Config], least: int, sizes: Sizes, cluster: Cluster) -> Iterator[Estimate]:
        """Of one layout, from the least recomputation on: the sizes of packs up to the first that does not fit."""
        tokens = self.loads.of(with_packs(ways[0], least), sizes.dp).tokens[-1]
        fewest = math.inf
        for config in ways:
            for size in pack_sizes(least, tokens, sizes.cp):
                one = with_packs(config, size)
                if self.loads.of(one, sizes.dp).num_packs >= fewest:
                    continue
                found = self.estimate(one, cluster, timed=False)
                yield found
                if not found.fits:
                    break
                fewest = found.load.num_packs

    def fastest(self, fitting: Sequence[Estimate], number: int) -> list[Estimate]:
        """Layouts of the fastest shapes with their times, the fastest first; of others it shows before stages are simulated.

        Args:
            fitting: those that fit.
            number: of shapes.
        """
        bounds = [step_seconds(self.arch, one.config, one.cluster, one.load, simulated=False).total for one in fitting]
        timed: list[Estimate] = []
        of_shapes: dict[Sizes, float] = {}
        for bound, one in sorted(zip(bounds, fitting, strict=True), key=lambda pair: pair[0]):
            times = sorted(of_shapes.values())
            if (
                times
                and bound > AS_GOOD * times[0]
                and (bound > MATTERS * times[0] or bound > (times + [math.inf] * number)[number - 1])
            ):
                break
            timed.append(dataclasses.replace(one, step=step_seconds(self.arch, one.config, one.cluster, one.load)))
            of_shapes[one.shape] = min(timed[-1].seconds, of_shapes.get(one.shape, math.inf))
        return sorted(timed, key=lambda one: one.seconds)

    def fits_on(self, cluster: Cluster) -> bool:
        """Whether any layout does."""
        return any(found.fits for found in self.candidates(cluster))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen, and beside what.

    Attributes:
        best: the layout.
        others: the fastest ones of other shapes, the best first.
        too_large: simple layouts that do not fit.
        num_layouts: how many were looked at.
    """

    best: Estimate
    others: Sequence[Estimate]
    too_large: Sequence[Estimate]
    num_layouts: int


def make_plan(planner: Planner, cluster: Cluster, *, num_others: int = 5) -> Plan:
    """Choose a layout.

    Args:
        planner: of the model and the data.
        cluster: the machines.
        num_others: how many others are told of.

    Raises:
        ConfigError: no layout works, or none fits; then how many GPUs would do.
    """
    found = list(planner.candidates(cluster))
    if not found:
        lines = "\n".join(f"  - {line}" for line in problems(planner.base, planner.arch, cluster.gpus))
        raise ConfigError(f"the trainer takes no layout of this model on {cluster}:\n{lines}")
    fitting = planner.fastest([one for one in found if one.fits], num_others + 1)
    if not fitting:
        raise ConfigError(_fits_nowhere(planner, cluster, found))
    best = min((one for one in fitting if one.seconds <= AS_GOOD * fitting[0].seconds), key=_complexity)
    fastest: dict[Sizes, Estimate] = {}
    for one in fitting:
        # In as many chunks as is best.
        fastest.setdefault(one.shape, one)
    others = [one for shape, one in fastest.items() if shape != best.shape]
    some_fit = {one.sizes for one in found if one.fits}
    misfits = {one.sizes: one for one in found if not one.fits and one.sizes not in some_fit}
    too_large = sorted(misfits.values(), key=_complexity)
    return Plan(best, others[:num_others], too_large[: max(1, num_others // 2)], len(found))


def _complexity(one: Estimate) -> tuple[float, ...]:
    sizes = one.sizes
    return (sizes.pp * sizes.chunks, sizes.cp, sizes.tp, sizes.ep, one.memory.peak)


def _fits_nowhere(planner: Planner, cluster: Cluster, found: Sequence[Estimate]) -> str:
    least = min(found, key=lambda one: one.memory.peak)
    text = f"no layout fits on {cluster}. The smallest, {least.name}, needs {least.memory_line}."
    factor = 2
    while cluster.gpus * factor <= MOST_GPUS:
        larger = cluster.times(factor)
        if larger.gpus // larger.nodes * larger.nodes == larger.gpus and planner.fits_on(larger):
            return f"{text} {larger.gpus} GPUs would do: --gpus {larger.gpus} --nodes {larger.nodes}."
        factor *= 2
    return f"{text} Up to {MOST_GPUS} GPUs would not do either: more memory a GPU, or shorter rows, would."


def why_not(one: Estimate, best: Estimate) -> str:
    """What a layout loses to the best one by."""
    if not one.fits:
        return f"does not fit: {one.memory_line}"
    assert one.step is not None
    assert best.step is not None
    more = {name: seconds - best.step.parts.get(name, 0.0) for name, seconds in one.step.parts.items()}
    name, seconds = max(more.items(), key=lambda item: item[1])
    slower = one.seconds / best.seconds - 1
    if slower < 0.005:
        return "as fast, with more parts"
    share = one.step.parts[name] / one.seconds
    return f"{slower:.1%} slower: +{figure(seconds)} s of {_WORDS.get(name, name)}, {share:.0%} of its step"


_WORDS = {
    "waiting": "pipeline bubble and imbalance",
    "tensor parallel": "tensor-parallel communication",
    "context parallel": "context-parallel communication",
    "expert parallel": "expert-parallel communication",
    "pipeline parallel": "communication between stages",
    "data parallel": "data-parallel communication",
    "compute": "computation (smaller packs)",
}
