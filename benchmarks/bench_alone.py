"""What log p(y) costs where the responses alone stand in the rows of the gradient pass, beside a pass of their own.

    python -m benchmarks.bench_alone [--lengths ultrafeedback hh] [--repeats 3]

The former is what a loop without a hook before the schedule has. FLOPs are counted for Llama-3-8B as bench_flops does it, CPU
seconds are measured in the small model of bench_step. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_flops import step_flops
from benchmarks.inputs import LLAMA_3_8B, RECORDED, cut_lengths, random_pairs, read_lengths
from benchmarks.measure import Spread, timed
from benchmarks.report import FOLDER, add_report_options, report
from benchmarks.sides import batch_builder, build_state
from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.step import train_step

SMALL = dataclasses.replace(
    LLAMA_3_8B,
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=896,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=4096,
)
# Where the responses alone stand; without them there is no log p(y), which is another objective.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "pass": ("rmipo", {}),
    "rows": ("rmipo", {"unconditional_in_rows": True}),
    "none": ("simpo", {}),
}


def batch_of(way: str, arch: ModelArchitecture, lengths: np.ndarray, options: argparse.Namespace) -> RankBatch:
    """A batch of the lengths, laid out in one of :data:`WAYS`."""
    objective, layout = WAYS[way]
    pairs = random_pairs(lengths, arch.vocab_size, np.random.default_rng(options.seed))
    builder = batch_builder(pairs, arch, build_objective(objective, {}), options.tokens_per_microbatch, **layout)
    return builder.build(np.arange(len(pairs)))


def cpu_seconds(lengths: np.ndarray, options: argparse.Namespace, groups: ProcessGroups) -> dict[str, Spread]:
    """CPU seconds of a step in each way, taken in turns.

    Raises:
        SystemExit: two ways to the same loss do not agree.
    """
    state = build_state(SMALL, groups, bf16=False)
    for group in state.optimizer.param_groups:
        # One model for all of them: they have to agree, and cost the same at any weights.
        group["lr"] = 0.0
    batches = {way: batch_of(way, SMALL, lengths, options) for way in WAYS}
    calls = {
        way: functools.partial(train_step, state, batch, build_objective(WAYS[way][0], {}), groups)
        for way, batch in batches.items()
    }
    losses = {way: call().metrics.values["loss"] for way, call in calls.items()}
    if not torch.allclose(losses["rows"], losses["pass"], rtol=1e-4, atol=1e-4):
        raise SystemExit("responses alone in the rows and in a pass do not give the same losses: nothing measured")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, call in calls.items():
            times[way].append(timed(call)[1])
    return {way: Spread.of(values) for way, values in times.items()}


def measure_alone(source: str, options: argparse.Namespace, groups: ProcessGroups) -> dict[str, Any]:
    """Every figure of one file of lengths, by its name."""
    lengths = np.random.default_rng(options.seed).permutation(cut_lengths(read_lengths(source), options.seq_length))
    row: dict[str, Any] = {"lengths": source}
    for way in WAYS:
        batch = batch_of(way, LLAMA_3_8B, lengths[: options.batch_size], options)
        row[f"flops_{way}"] = step_flops(LLAMA_3_8B, batch, groups)
    for way, spread in cpu_seconds(lengths[: options.num_pairs], options, groups).items():
        row.update({f"cpu_seconds_{way}_{part}": value for part, value in dataclasses.asdict(spread).items()})
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per file of lengths; ratios are to the step with a pass of its own, and of that to a step without log p(y)."""
    lines = [f"{'lengths':<16}{'FLOPs, rows / pass':>20}{'pass / none':>13}{'CPU s, rows / pass':>20}{'pass / none':>13}"]
    for row in rows:
        ratios = [row[f"{figure}_{one}{end}"] / row[f"{figure}_{other}{end}"]
                  for figure, end in (("flops", ""), ("cpu_seconds", "_p50"))
                  for one, other in (("rows", "pass"), ("pass", "none"))]  # fmt: skip
        lines.append(
            f"{row['lengths']:<16}" + "".join(f"{ratio:>{width}.3f}" for ratio, width in zip(ratios, (20, 13) * 2, strict=True))
        )
    return "\n".join(lines)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_alone", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths", nargs="+", default=list(RECORDED), help="recorded lengths or files, as of bench_step (default: %(default)s)"
    )
    for name, default, meaning in (
        ("batch-size", 64, "pairs whose FLOPs are counted"),
        ("num-pairs", 12, "pairs of the step that is timed"),
        ("tokens-per-microbatch", 8192, "most tokens of one pack"),
        ("seq-length", 2048, "cut lengths so that prompt and response fit"),
        ("repeats", 3, "steps that are timed"),
        ("threads", 1, "of torch"),
        ("seed", 1, "of the choice of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_alone.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, time, show, append."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    groups = initialize_runtime(1, 1, seed=options.seed)
    names = ("batch_size", "num_pairs", "tokens_per_microbatch", "seq_length", "repeats", "seed")
    settings = {name: getattr(options, name) for name in names}
    rows = [settings | measure_alone(source, options, groups) for source in options.lengths]
    shutdown_runtime()
    return report(options, "alone", table(rows), rows, [])


if __name__ == "__main__":
    sys.exit(main())
