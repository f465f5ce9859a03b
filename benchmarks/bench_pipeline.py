"""How long pipeline stages stand still in a step, before and after packs are cut for them, for recorded token lengths.

    python -m benchmarks.bench_pipeline [--lengths ultrafeedback hh] [--stages 1 2 4 8 16] [--ranks 1 8 32 128] [--check]

Before: packs as few as fit. After: ``--least`` for each stage, by default as many as the trainer makes. Batches
are cut as the trainer cuts them for an RMiPO step, and go through its simulation of Megatron's schedule. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import BOS, LLAMA_3_8B, LLAMA_3_70B, RECORDED, Lengths, cut_lengths, read_lengths, step_costs
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.pipeline_bubble import PassCosts, Stages, even_length, idle_share, simulated_length
from megatron_rmipo.data.batches.spread import spread_evenly
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.flops import forward_cost_model

MODELS = {"Llama-3-8B": LLAMA_3_8B, "Llama-3-70B": LLAMA_3_70B}
WHEN = ("before", "after")
# Of a batch's replicas, the costliest are simulated: one of them ends the step.
REPLICAS = 4
GOAL_SETTINGS = {"seq_length": 2048, "tokens_per_microbatch": 8192, "least": None}
HALVED, MOST_IDLE, NOT_SLOWER = 0.5, 0.25, 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One case of the grid."""

    lengths: str
    model: str
    stages: int
    ranks: int
    batch_size: int


def measure(setting: Setting, lengths: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of a case by its name, ``NAME_before`` and ``NAME_after``; means over the batches but for the packs.

    ``gradient`` and ``unconditional`` are the idle shares of these passes by themselves, ``step`` that of both, of which one
    begins while the other drains; ``_even`` the same if all packs and stages cost the same. ``cost`` is how long a step takes,
    with what a pack costs beside its tokens, over the work of its tokens.
    """
    row = dataclasses.asdict(setting)
    layout = BatchLayout(
        dp_rank=0,
        dp_size=setting.ranks,
        tokens_per_microbatch=options.tokens_per_microbatch,
        cost=forward_cost_model(MODELS[setting.model]),
        unconditional="bos",
        bos_token_id=BOS,
        stages=Stages.even(setting.stages),
    )
    pairs, order = PairCollection([Lengths(lengths)]), PairOrder(len(lengths), options.seed)  # type: ignore[list-item]
    for when, number in zip(WHEN, (0, options.least), strict=True):
        cut = dataclasses.replace(layout, min_packs_per_stage=number)
        figures = []
        for first in range(0, options.num_batches * setting.batch_size, setting.batch_size):
            indices = order.batch(first, setting.batch_size, first + setting.batch_size)
            costs = step_costs(lengths[indices], layout)
            loads = np.array([costs[share].sum() for share in spread_evenly(costs, setting.ranks)])
            total, passes_of = BatchBuilder(pairs, cut).pass_costs(indices, np.argsort(-loads)[:REPLICAS].tolist())
            figures.append({"imbalance": float(loads.max() / loads.mean()), **_figures(total, passes_of, cut)})
        row |= {f"{name}_{when}": float(np.mean([one[name] for one in figures])) for name in figures[0]}
    return row


def _figures(total: float, passes_of: Sequence[Sequence[PassCosts]], layout: BatchLayout) -> dict[str, float]:
    """Of one batch: what it costs in all, and what its simulated replicas run."""
    stages, replicas = layout.stages, layout.dp_size

    def share(length: Any, work: float, chosen: slice) -> float:
        return idle_share(work, max(length(passes[chosen], stages) for passes in passes_of), stages.num_stages, replicas)

    # The replicas are alike: each pass is the same part of every one's work.
    unconditional = sum(passes[0].work for passes in passes_of) / sum(one.work for passes in passes_of for one in passes)
    found = {}
    for name, work, chosen in (
        ("step", total, slice(None)),
        ("unconditional", total * unconditional, slice(0, 1)),
        ("gradient", total * (1.0 - unconditional), slice(1, 2)),
    ):
        found[name] = share(simulated_length, work, chosen)
        found[f"{name}_even"] = share(even_length, work, chosen)
    with_overhead = [[one.with_overhead(layout.cost.per_token) for one in passes] for passes in passes_of]
    found["cost"] = max(simulated_length(passes, stages) for passes in with_overhead) * stages.num_stages * replicas / total
    found["unconditional_packs"], found["gradient_packs"] = (len(one.layers) for one in passes_of[0])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per case."""
    lines = [
        f"{'lengths':<14}{'model':<13}{'PP':>4}{'DP':>5}{'pairs':>7}{'packs':>11}{'gradient':>15}{'uncond.':>15}{'step':>15}"
        f"{'even':>15}{'time':>7}{'max/mean':>10}"
    ]
    for one in rows:
        packs = f"{one['gradient_packs_before']:.0f} > {one['gradient_packs_after']:.0f}"
        shares = [
            f"{one[f'{name}_before']:>8.1%} >{one[f'{name}_after']:>5.0%}"
            for name in ("gradient", "unconditional", "step", "step_even")
        ]
        lines.append(
            f"{one['lengths']:<14}{one['model']:<13}{one['stages']:>4}{one['ranks']:>5}{one['batch_size']:>7}{packs:>11}"
            f"{''.join(shares)}{one['cost_after'] / one['cost_before']:>7.2f}{one['imbalance_after']:>10.4f}"
        )
    ratios = [math.log(one["cost_after"] / one["cost_before"]) for one in rows]
    lines.append(f"time, after over before, geometric mean: {math.exp(np.mean(ratios)):.3f}")
    return "\n".join(lines)


def goals(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """With the trainer's defaults: two cases, and the whole grid that was run."""
    held: list[Goal] = []
    if any(getattr(options, name) != value for name, value in GOAL_SETTINGS.items()):
        return held
    for source in dict.fromkeys(row["lengths"] for row in rows):
        own = [row for row in rows if row["lengths"] == source]
        for model, size in (("Llama-3-8B", 128), ("Llama-3-70B", 512)):
            for row in own:
                if (row["model"], row["stages"], row["ranks"], row["batch_size"]) == (model, 4, 8, size):
                    title = f"pipeline, {source}, {model}, PP 4, DP 8, {size} pairs: idle share of a step"
                    held.append(Goal(title, MOST_IDLE, row["step_after"]))
                    held.append(Goal(f"{title}, after over before", HALVED, row["step_after"] / row["step_before"]))
        slower = max(row["cost_after"] / row["cost_before"] for row in own)
        held.append(Goal(f"pipeline, {source}: time of a step, after over before, worst case", NOT_SLOWER, slower))
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_pipeline", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths", nargs="+", default=list(RECORDED), help="recorded lengths or files, as of bench_step (default: %(default)s)"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="shapes (default: %(default)s)")
    for name, default, meaning in (
        ("stages", [1, 2, 4, 8, 16], "pipeline stages"),
        ("ranks", [1, 8, 32, 128], "data-parallel ranks"),
        ("batch-sizes", [128, 512, 2048], "pairs of a global batch"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--least", type=int, help="micro-batches for each stage, after (default: as many as the trainer makes)")
    for name, number, meaning in (
        ("tokens-per-microbatch", 8192, "most tokens of a pack"),
        ("num-batches", 2, "batches of each case"),
        ("seq-length", 2048, "cut lengths so that prompt and response fit"),
        ("seed", 1, "of the order of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_pipeline.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, show, append."""
    options = parse_options(argv)
    found = {source: cut_lengths(read_lengths(source), options.seq_length) for source in options.lengths}
    grid = itertools.product(found, options.models, options.stages, options.ranks, options.batch_sizes)
    cases = [Setting(*case) for case in grid]
    rows = [measure(case, found[case.lengths], options) for case in cases if case.batch_size >= case.ranks]
    settings = {name: getattr(options, name) for name in ("tokens_per_microbatch", "num_batches", "seq_length", "seed")}
    settings["least"] = "default" if options.least is None else options.least
    return report(options, "pipeline", table(rows), [settings | row for row in rows], goals(options, rows))


if __name__ == "__main__":
    sys.exit(main())
