"""What a training rank's data costs beside its model: start-up, the order of pairs, batches, mismatched pairs, at 60M pairs.

    python -m benchmarks.bench_order [--num-pairs 60000 60000000] [--check]

The data is an index of lengths drawn from recorded ones, and a file of tokens that holds none (sparse). Each part runs in a
process of its own. Own memory is what a process has written and shares with nobody: ``Private_Dirty`` of
``/proc/self/smaps_rollup``; pages of mapped files, which all ranks of a host share, are no part of it. See README.md beside it.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.inputs import BOS, LLAMA_3_8B, cut_lengths, read_lengths
from benchmarks.large_data import make_large_data
from benchmarks.measure import Spread, timed
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.read_ahead import iterate_batches
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.fingerprint import collection_fingerprint, content_facts
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.model.flops import forward_cost_model

GOAL_PAIRS, SMALL_PAIRS = 60_000_000, 60_000
MOST_MEGABYTES, MOST_CPU_SECONDS, MOST_RATIO = 100.0, 5.0, 2.0
HELD_OUT = 0.01
FEW_PAIRS = 100


def own_bytes(process: int | str = "self") -> int:
    """Bytes that a process has written and shares with nobody."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


class Watch:
    """CPU seconds and own memory, at the most and at the end, of what runs within it, above what there was before."""

    def __enter__(self) -> Watch:
        self._before, self._most, self._done = own_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._cpu = time.process_time()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, own_bytes())

    def __exit__(self, *_: object) -> None:
        self.cpu_seconds = time.process_time() - self._cpu
        self._done.set()
        self._thread.join()
        after = own_bytes()
        self.peak_megabytes = (max(self._most, after) - self._before) / 1e6
        self.megabytes = (after - self._before) / 1e6


def the_layout() -> BatchLayout:
    """RMiPO's batches of Llama-3-8B for one of eight data-parallel ranks."""
    return BatchLayout(
        dp_rank=0,
        dp_size=8,
        tokens_per_microbatch=16384,
        cost=forward_cost_model(LLAMA_3_8B),
        unconditional="bos",
        bos_token_id=BOS,
    )


def opened(prefix: str) -> tuple[PairCollection, PairCollection]:
    """Pairs to train on and to evaluate on, as the trainer opens them."""
    first, last = PairCollection([PairStore(prefix)]).split(HELD_OUT)
    return PairCollection.combine([first]), PairCollection.combine([last])


def start_up(prefix: str, options: argparse.Namespace) -> dict[str, float]:
    """All that a rank's start does with its data: opening, what it compares with other ranks and with the run so far, fitting."""
    opened(options.few)  # what is imported on the way
    with Watch() as watch:
        collections = opened(prefix)
        content_facts(collections[0].stores[0])
        for pairs in collections:
            collection_fingerprint(pairs)
            check_pairs_fit(pairs, the_layout())
    figures = {"cpu_seconds": watch.cpu_seconds, "megabytes": watch.megabytes, "peak_megabytes": watch.peak_megabytes}
    return {f"start_{name}": value for name, value in figures.items()}


def batches(prefix: str, options: argparse.Namespace) -> dict[str, float]:
    """The order of a batch, and a batch cut and laid out, its lengths looked up; then the same in a worker of the loader."""
    pairs, size = opened(prefix)[0], options.batch_size
    builder, order = BatchBuilder(pairs, the_layout()), PairOrder(len(pairs), options.seed)
    # What is allocated once, of whatever size the data is.
    builder.build(np.arange(size))
    with Watch() as watch:
        orders = [timed(functools.partial(order.batch, n * size, size, len(pairs)))[1] for n in range(options.num_batches)]
        indices = [order.batch(n * size, size, len(pairs)) for n in range(options.num_batches)]
        builds = [timed(functools.partial(builder.build, one))[1] for one in indices]
    loader = iterate_batches(builder, order, batch_size=size, total_pairs=len(pairs), num_workers=1)
    for _ in range(options.num_batches):
        next(loader)
    worker = max(own_bytes(child.pid) for child in multiprocessing.active_children() if child.pid)
    return {
        "order_cpu_ms": 1e3 * Spread.of(orders).p50,
        "build_cpu_ms": 1e3 * Spread.of(builds).p50,
        "batches_peak_megabytes": watch.peak_megabytes,
        "worker_megabytes": worker / 1e6,
    }


def mismatched(prefix: str, options: argparse.Namespace) -> dict[str, float]:
    """Finding the partners of a data set, as far as a start does, and of a batch."""
    pairs = opened(prefix)[0]
    with Watch() as watch:
        pairs.match_anew()
        order, size = PairOrder(len(pairs), options.seed), options.batch_size
        builder = BatchBuilder(pairs, the_layout())
        times = [
            timed(functools.partial(builder.build, order.batch(n * size, size, len(pairs))))[1]
            for n in range(options.num_batches)
        ]
    return {
        "mismatched_cpu_seconds": watch.cpu_seconds,
        "mismatched_build_cpu_ms": 1e3 * Spread.of(times).p50,
        "mismatched_peak_megabytes": watch.peak_megabytes,
    }


PARTS: tuple[Callable[[str, argparse.Namespace], dict[str, float]], ...] = (start_up, batches, mismatched)


def measure(num_pairs: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a data set of so many pairs."""
    lengths = cut_lengths(read_lengths(options.lengths), options.seq_length)
    prefix, options.few = (make_large_data(folder, count, lengths, options.seed) for count in (num_pairs, FEW_PAIRS))
    row: dict[str, Any] = {"num_pairs": num_pairs}
    for part in PARTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            row |= fresh.submit(part, prefix, options).result()
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per figure, a column per number of pairs."""
    names = [name for name in rows[0] if name != "num_pairs"]
    lines = [f"{'pairs':<28}" + "".join(f"{row['num_pairs']:>14,}" for row in rows)]
    return "\n".join(lines + [f"{name:<28}" + "".join(f"{row[name]:>14.3f}" for row in rows) for name in names])


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Of 60 million pairs, and of the order's cost beside that of 60 thousand."""
    by_size = {row["num_pairs"]: row for row in rows}
    if GOAL_PAIRS not in by_size:
        return []
    large, title = by_size[GOAL_PAIRS], "data of 60M pairs"
    memory = large["start_peak_megabytes"] + large["batches_peak_megabytes"]
    held = [
        Goal(f"{title}: CPU s of a rank's start", MOST_CPU_SECONDS, large["start_cpu_seconds"]),
        Goal(f"{title}: MB of a rank's own, start and batches, at the most", MOST_MEGABYTES, memory),
        Goal(f"{title}: MB of a rank's own, mismatched pairs, at the most", MOST_MEGABYTES, large["mismatched_peak_megabytes"]),
    ]
    if SMALL_PAIRS in by_size:
        ratio = large["order_cpu_ms"] / by_size[SMALL_PAIRS]["order_cpu_ms"]
        held.append(Goal(f"{title}: CPU time of a batch's order over that of 60k pairs", MOST_RATIO, ratio))
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_order", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--num-pairs", nargs="+", type=int, default=[SMALL_PAIRS, GOAL_PAIRS], help="of the data (default: %(default)s)"
    )
    parser.add_argument("--lengths", default="ultrafeedback", help="recorded lengths or a file (default: %(default)s)")
    for name, default, meaning in (
        ("batch-size", 128, "pairs of a global batch"),
        ("num-batches", 20, "batches that are measured"),
        ("seq-length", 2048, "cut lengths so that prompt and response fit"),
        ("seed", 1, "of the order of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--folder", help="where the data is made for a while (default: a temporary one; 44 bytes a pair)")
    add_report_options(parser, FOLDER / "results_order.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, measure, show, append."""
    options = parse_options(argv)
    settings = {name: getattr(options, name) for name in ("lengths", "batch_size", "num_batches", "seq_length", "seed")}
    rows = []
    for num_pairs in options.num_pairs:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(settings | measure(num_pairs, Path(folder), options))
    shown = [{name: value for name, value in row.items() if name not in settings} for row in rows]
    return report(options, "order", table(shown), rows, goals(rows))


if __name__ == "__main__":
    sys.exit(main())
