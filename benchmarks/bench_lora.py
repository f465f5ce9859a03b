"""Training an adapter beside training the whole model, and beside peft with TRL's trainer: memory, CPU time, what is trained.

    python -m benchmarks.bench_lora [--trl] [--bf16] [--lengths hh|ultrafeedback|FILE] [--check]

One optimizer step of SimPO over the same pairs, from the same weights; every side in a process of its own, in turns. Adapters of
peft begin with our A, and losses of every pair and gradient norms of the first two steps must agree, or nothing is measured. See
README.md beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_step import add_model_options
from benchmarks.inputs import RECORDED, read_pairs, save_random_model
from benchmarks.lora_sides import SIDES, Side, SideCost, cost_of
from benchmarks.measure import Spread
from benchmarks.ranks import run_ranks
from benchmarks.report import FOLDER, Goal, add_report_options, report
from benchmarks.sides import compare

# What goals were set for, fp32, each over our training of the whole model: memory that stays, with it a step's peak, CPU time.
GOAL_MODEL = {"hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 8, "vocab_size": 8192, "rank": 16, "bf16": False}
GOAL_PAIRS = {"lengths": "hh", "num_pairs": 4, "shrink": 1, "seq_length": 2048, "tokens_per_microbatch": 4096}
MOST_STANDING, MOST_CPU = 0.35, 0.9


def chosen_sides(options: argparse.Namespace) -> list[Side]:
    """Those that are measured."""
    return [side for side in SIDES if side.is_ours or options.trl]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[SideCost]]:
    """What each side cost in each round."""
    save_random_model(options, folder)
    costs: dict[str, list[SideCost]] = {side.name: [] for side in chosen_sides(options)}
    for number in range(options.repeats):
        for side in chosen_sides(options):
            # Counting slows a step down, and finds the same each time.
            (cost,) = run_ranks(cost_of, 1, side, options, folder, number == 0)
            costs[side.name].append(cost)
    return costs


def check_agreement(costs: Mapping[str, Sequence[SideCost]], tolerance: float) -> float:
    """The largest relative difference of the first steps of sides that train the same adapter.

    Raises:
        SystemExit: it is above ``tolerance``.
    """
    ours, worst = costs["lora"][0], 0.0
    for name, (other, *_) in costs.items():
        if name == "full":
            continue
        for number, (mine, theirs) in enumerate(zip(ours.first_steps, other.first_steps, strict=True), start=1):
            worst = max(worst, compare(mine, theirs, f"step {number}: lora and {name}", tolerance))
    return worst


def rows_of(options: argparse.Namespace, costs: Mapping[str, Sequence[SideCost]], agreement: float) -> list[dict[str, Any]]:
    """A row for each side, with its ratios to our training of the whole model."""
    names = ["hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "vocab_size", "rank"]
    names += ["bf16", "shrink", "seq_length", "tokens_per_microbatch", "pairs_per_microbatch", "repeats"]
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings |= {"lengths": Path(options.lengths).name, "pairs": options.num_pairs, "agreement": agreement}
    if options.trl:
        settings |= {name: version(name) for name in ("trl", "peft")}
    rows: list[dict[str, Any]] = []
    for side in chosen_sides(options):
        rounds = costs[side.name]
        counted = rounds[0]
        row = {"side": side.name, **settings}
        row |= {name: getattr(counted, name) for name in ("parameter_bytes", "other_bytes", "pass_bytes", "flops", "tokens")}
        row["trained_share"] = counted.num_trained / counted.num_parameters
        row["standing_bytes"] = counted.parameter_bytes + counted.other_bytes
        row["peak_bytes"] = row["standing_bytes"] + counted.pass_bytes
        row["resident_bytes"] = median(cost.resident_bytes for cost in rounds)
        spread = Spread.of([seconds for cost in rounds for seconds in cost.cpu_seconds])
        row |= {"cpu_seconds_p20": spread.p20, "cpu_seconds_p50": spread.p50, "cpu_seconds_p80": spread.p80}
        first = rows[0] if rows else row
        for ratio, column in RATIOS.items():
            row[ratio] = row[column] / first[column]
        rows.append(row)
    return rows


# Column -> of what it is the ratio.
RATIOS = {
    "standing_over_full": "standing_bytes",
    "peak_over_full": "peak_bytes",
    "resident_over_full": "resident_bytes",
    "cpu_over_full": "cpu_seconds_p50",
    "flops_over_full": "flops",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per side; ratios are to our training of the whole model."""
    titles = "".join(f"{title:>10}{'':>8}" for title in ("stays MiB", "peak MiB", "RSS MiB", "CPU s"))
    lines = [f"{'a step of SimPO':<26}{'trained':>9}{titles}{'GFLOP':>9}"]
    for row in rows:
        figures = [(row[column] / 2**20, row[ratio]) for ratio, column in list(RATIOS.items())[:3]]
        figures.append((row["cpu_seconds_p50"], row["cpu_over_full"]))
        shown = "".join(f"{value:>10.2f}{ratio:>7.2f}x" for value, ratio in figures)
        lines.append(f"{row['side']:<26}{row['trained_share']:>9.2%}{shown}{row['flops'] / 1e9:>9.1f}")
    return "\n".join(lines)


def goals(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """What an adapter was to save of the whole model's training, in one model."""
    if not {**GOAL_MODEL, **GOAL_PAIRS}.items() <= vars(options).items():
        return []
    (row,) = (row for row in rows if row["side"] == "lora")
    title = "adapter of rank 16 over the whole model, 32M parameters"
    return [
        Goal(f"{title}: memory that stays", MOST_STANDING, row["standing_over_full"]),
        Goal(f"{title}: CPU time of a step", MOST_CPU, row["cpu_over_full"]),
    ]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_lora", allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--trl", action="store_true", help="peft with TRL's CPOTrainer, too (needs the extra bench)")
    parser.add_argument("--bf16", action="store_true", help="frozen weights and compute in bf16, all sides")
    parser.add_argument(
        "--lengths",
        metavar=f"{'|'.join(RECORDED)}|FILE",
        default="hh",
        help="recorded lengths, or jsonl of prompt_len, chosen_len, rejected_len; tokens are random (default: %(default)s)",
    )
    parser.add_argument("--shrink", type=float, default=1.0, help="divide lengths by this (default: %(default)s)")
    sizes = {"num-pairs": 4, "seq-length": 2048, "hidden-size": 512, "ffn-hidden-size": 1408, "num-layers": 8}
    sizes |= {"num-attention-heads": 8, "num-query-groups": 4, "vocab-size": 8192, "rank": 16}
    add_model_options(parser, sizes | {"tokens-per-microbatch": 4096, "pairs-per-microbatch": 2, "repeats": 3, "seed": 1})
    add_report_options(parser, FOLDER / "results_lora.csv")
    options = parser.parse_args(argv)
    options.data_path = None
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, check, show, append."""
    options = parse_options(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(options, Path(folder))
    agreement = check_agreement(costs, tolerance=3e-2 if options.bf16 else 1e-4)
    rows = rows_of(options, costs, agreement)
    tokens = int(read_pairs(options).lengths.sum())
    title = f"rank {options.rank}, {options.num_pairs} pairs, {tokens} tokens; results agree to {agreement:.1e}"
    return report(options, "lora", f"{title}\n{table(rows)}", rows, goals(options, rows))


if __name__ == "__main__":
    sys.exit(main())
