"""How evenly the trainer spreads a global batch over data-parallel ranks, and how long that takes, for recorded token lengths.

    python -m benchmarks.bench_balance [--lengths ultrafeedback hh] [--ranks 8 16 32] [--check]

Costs are those of the trainer: FLOPs of an RMiPO step of Llama-3-8B (gradient pass and unconditional pass). Every rank waits for
the costliest one, so max / mean of the ranks' costs is the factor by which a step takes longer. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import LLAMA_3_8B, RECORDED, cut_lengths, read_lengths, step_costs
from benchmarks.measure import Spread, timed
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.spread import spread_evenly
from megatron_rmipo.model.flops import forward_cost_model

GOAL_LENGTHS, GOAL_BATCH_SIZE, GOAL_SEQ_LENGTH = "ultrafeedback", 128, 2048
MOST_IMBALANCE = {8: 1.005, 16: 1.01, 32: 1.03}
MOST_MILLISECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Balance:
    """What was measured over many batches of one length file on one number of ranks.

    Attributes:
        imbalance, worst: max / mean of the ranks' costs; the largest over all batches.
        bound, worst_bound: median and largest of what no spread can beat, since a pair is never split: the costliest pair / mean.
        milliseconds, cpu_milliseconds: to find costs and shares of one batch.
        peak_bytes: most memory of Python and NumPy while doing so.
    """

    lengths: str
    ranks: int
    imbalance: Spread
    worst: float
    bound: float
    worst_bound: float
    milliseconds: Spread
    cpu_milliseconds: Spread
    peak_bytes: int

    def row(self) -> dict[str, Any]:
        """Every figure by its name."""
        row: dict[str, Any] = {"lengths": self.lengths, "ranks": self.ranks}
        for name in ("imbalance", "milliseconds", "cpu_milliseconds"):
            row.update({f"{name}_{part}": value for part, value in dataclasses.asdict(getattr(self, name)).items()})
        rest = {name: getattr(self, name) for name in ("worst", "bound", "worst_bound", "peak_bytes")}
        return row | rest


def share_out(lengths: np.ndarray, layout: BatchLayout) -> list[list[int]]:
    """Each rank's pairs, from the lengths of a global batch."""
    return spread_evenly(step_costs(lengths, layout), layout.dp_size)


def measure_balance(source: str, lengths: np.ndarray, ranks: int, options: argparse.Namespace) -> Balance:
    """Spread ``--num-batches`` batches in the trainer's own order, one after the other."""
    layout = BatchLayout(
        dp_rank=0,
        dp_size=ranks,
        tokens_per_microbatch=16384,
        cost=forward_cost_model(LLAMA_3_8B),
        unconditional="bos",
        bos_token_id=1,
    )
    order = PairOrder(len(lengths), options.seed)
    ratios, bounds, times = [], [], []
    for number in range(options.num_batches):
        batch = lengths[order.batch(number * options.batch_size, options.batch_size, (number + 1) * options.batch_size)]
        times.append(timed(functools.partial(share_out, batch, layout)))
        costs = step_costs(batch, layout)
        loads = np.array([costs[share].sum() for share in share_out(batch, layout)])
        ratios.append(float(loads.max() / loads.mean()))
        bounds.append(max(1.0, float(costs.max() / loads.mean())))
    tracemalloc.start()
    share_out(batch, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Balance(
        source,
        ranks,
        Spread.of(ratios),
        max(ratios),
        statistics.median(bounds),
        max(bounds),
        Spread.of([1e3 * wall for wall, _ in times]),
        Spread.of([1e3 * cpu for _, cpu in times]),
        peak,
    )


def table(results: Sequence[Balance]) -> str:
    """A line per length file and number of ranks."""
    lines = [
        f"{'lengths':<16}{'ranks':>6}{'max/mean':>11}{'worst':>9}{'bound':>9}{'worst':>9}{'ms':>8}{'ms p80':>8}{'CPU ms':>8}"
    ]
    for one in results:
        lines.append(
            f"{one.lengths:<16}{one.ranks:>6}{one.imbalance.p50:>11.4f}{one.worst:>9.4f}{one.bound:>9.4f}{one.worst_bound:>9.4f}"
            f"{one.milliseconds.p50:>8.2f}{one.milliseconds.p80:>8.2f}{one.cpu_milliseconds.p50:>8.2f}"
        )
    return "\n".join(lines)


def goals(options: argparse.Namespace, results: Sequence[Balance]) -> list[Goal]:
    """For batches of 128 pairs of UltraFeedback lengths, cut to 2,048 tokens; the worst batch counts."""
    held: list[Goal] = []
    if (options.batch_size, options.seq_length) != (GOAL_BATCH_SIZE, GOAL_SEQ_LENGTH):
        return held
    for one in results:
        if one.lengths == GOAL_LENGTHS and one.ranks in MOST_IMBALANCE:
            title = f"balance, {one.lengths}, {one.ranks} ranks"
            held.append(Goal(f"{title}: max / mean, worst batch", MOST_IMBALANCE[one.ranks], one.worst))
            held.append(Goal(f"{title}: milliseconds, median", MOST_MILLISECONDS, one.milliseconds.p50))
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_balance", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths", nargs="+", default=list(RECORDED), help="recorded lengths or files, as of bench_step (default: %(default)s)"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32], help="data-parallel ranks (default: %(default)s)")
    for name, default, meaning in (
        ("batch-size", GOAL_BATCH_SIZE, "pairs of a global batch"),
        ("num-batches", 200, "batches to spread"),
        ("seq-length", GOAL_SEQ_LENGTH, "cut lengths so that prompt and response fit"),
        ("seed", 1, "of the order of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_balance.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Spread, show, append."""
    options = parse_options(argv)
    results = []
    for source in options.lengths:
        lengths = cut_lengths(read_lengths(source), options.seq_length)
        results += [measure_balance(source, lengths, ranks, options) for ranks in options.ranks]
    settings = {name: getattr(options, name) for name in ("batch_size", "num_batches", "seq_length", "seed")}
    rows = [settings | one.row() for one in results]
    return report(options, "balance", table(results), rows, goals(options, results))


if __name__ == "__main__":
    sys.exit(main())
