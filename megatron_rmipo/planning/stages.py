"""How long the stages of a pipeline take together, and how long they stand still."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_rmipo.config.parallel_flags import ParallelConfig
from megatron_rmipo.config.pipeline_split import num_chunks, stage_layers
from megatron_rmipo.data.batches.pipeline_bubble import PassCosts, simulated_length


@dataclasses.dataclass(frozen=True)
class _Split(PassCosts):
    """Packs over stages of unequal numbers of layers.

    Attributes:
        shares: of each stage in the layers.
    """

    shares: tuple[float, ...] = ()

    def on_stage(self, stage: int, num_stages: int) -> np.ndarray:
        own = self.layers * self.shares[stage]
        return own + self.head if stage == num_stages - 1 else own


def pipeline_length(passes: Sequence[PassCosts], parallel: ParallelConfig, num_layers: int) -> float:
    """How long a replica takes for the passes of a step, in the units of their costs.

    Chunks that a stage runs in turn divide the time in which it waits for the first and after the last pack.
    """
    num_stages = parallel.pipeline_model_parallel_size
    if num_stages == 1:
        return sum(one.work for one in passes)
    layers = [sum(map(len, chunks)) for chunks in stage_layers(num_layers, parallel)]
    shares = tuple(count / num_layers for count in layers)
    split = [_Split(one.layers, one.head, one.backward, shares) for one in passes]
    length = simulated_length(split, num_stages)
    work = [sum(_work(one, stage, num_stages) for one in split) for stage in range(num_stages)]
    return max(work) + (length - max(work)) / num_chunks(num_layers, parallel)


def _work(one: PassCosts, stage: int, num_stages: int) -> float:
    return float(one.on_stage(stage, num_stages).sum()) * (3.0 if one.backward else 1.0)
