"""Global batches from the trainer's own loader, beside a stand-in for the model's step."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs import BOS, EOS, LLAMA_3_8B
from benchmarks.measure import Spread, timed
from megatron_rmipo.config.schema import DataConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.read_ahead import iterate_batches
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStore, PairStoreWriter, TokenizedPair
from megatron_rmipo.model.flops import forward_cost_model, peak_flops

VOCAB_SIZE = 32_000  # of the random tokens
STEP_DEVICE = "H100"


@dataclasses.dataclass(frozen=True)
class Loading:
    """Global batches as one of ``ranks`` data-parallel ranks gets them.

    Attributes:
        source: whose lengths.
        build_cpu_ms: CPU milliseconds to cut and lay out one batch, in one process.
        own_cpu_ms: what the trainer's own process spends to get a batch, by whichever of its threads.
        step_ms: the emulated step.
        first_ms: wait for the first batch, workers starting.
        wait_ms: wait for each of the others.
        share: of the time of all steps but the first, how much was spent waiting.
    """

    source: str
    ranks: int
    num_workers: int
    build_cpu_ms: Spread
    own_cpu_ms: Spread
    step_ms: Spread
    first_ms: float
    wait_ms: Spread
    share: float


def save_store(prefix: Path, lengths: np.ndarray, seed: int) -> PairStore:
    """A data set of random tokens of the given lengths, int ``[P, 3]``."""
    rng = np.random.default_rng(seed)
    with PairStoreWriter(prefix, VOCAB_SIZE) as writer:
        for sizes in lengths.tolist():
            prompt, chosen, rejected = (rng.integers(3, VOCAB_SIZE, size) for size in sizes)
            prompt[0], chosen[-1], rejected[-1] = BOS, EOS, EOS
            writer.add(TokenizedPair(prompt, chosen, rejected))
        writer.finalize(Manifest(tokenizer=TokenizerInfo("random tokens", VOCAB_SIZE, BOS, EOS)))
    return PairStore(prefix)


def measure_loading(source: str, store: PairStore, options: argparse.Namespace) -> Loading:
    """Build ``--num-batches`` batches one after the other, then take them from the trainer's loader beside emulated steps.

    A step lasts as long as the batch's FLOPs take on ``--ranks`` devices at the peak of their data sheet: none is shorter, nor
    leaves the loader less time.
    """
    layout = BatchLayout(
        dp_rank=0,
        dp_size=options.ranks,
        tokens_per_microbatch=DataConfig().tokens_per_microbatch,
        cost=forward_cost_model(LLAMA_3_8B),
        unconditional="bos",
        bos_token_id=BOS,
    )
    builder, order = BatchBuilder(PairCollection([store]), layout), PairOrder(len(store), options.seed)
    flops = peak_flops(STEP_DEVICE, torch.bfloat16)
    assert flops is not None
    total_pairs = (options.num_batches + 1) * options.batch_size
    build, own, waits, steps = [], [], [], []
    for first in range(0, total_pairs, options.batch_size):
        indices = order.batch(first, options.batch_size, total_pairs)
        build.append(1e3 * timed(functools.partial(builder.build, indices))[1])
    batches = iterate_batches(
        builder, order, batch_size=options.batch_size, total_pairs=total_pairs, num_workers=options.num_workers
    )
    for _ in range(options.num_batches + 1):
        started, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        waits.append(1e3 * (time.perf_counter() - started))
        steps.append(1e3 * batch.cost / (options.ranks * flops))
        time.sleep(steps[-1] / 1e3)
        own.append(1e3 * (time.process_time() - cpu))
    return Loading(
        source=source,
        ranks=options.ranks,
        num_workers=options.num_workers,
        build_cpu_ms=Spread.of(build),
        own_cpu_ms=Spread.of(own[1:]),
        step_ms=Spread.of(steps),
        first_ms=waits[0],
        wait_ms=Spread.of(waits[1:]),
        share=wait_share(waits, steps),
    )


def wait_share(waits: Sequence[float], steps: Sequence[float]) -> float:
    """Of waits and steps, all but the first of each, the part that is waiting."""
    waited = sum(waits[1:])
    return waited / (waited + sum(steps[1:]))
