"""Counted FLOPs of an RMiPO step of a large model against the least that the loss needs, for recorded token lengths.

    python -m benchmarks.bench_flops [--lengths ultrafeedback hh] [--batch-size 128] [--check]

The trainer's policy runs over the trainer's own packs on torch's meta device: operators are dispatched and counted, nothing is
computed, so Llama-3-8B fits anywhere. A model of one layer and one of two are counted; a further layer does what the second one
does. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import LLAMA_3_8B, RECORDED, cut_lengths, random_pairs, read_lengths
from benchmarks.measure import counted_flops
from benchmarks.report import FOLDER, Goal, add_report_options, report
from benchmarks.sides import batch_builder, minimum_flops
from megatron_rmipo.config.schema import ModelConfig
from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.packing import PackedRow
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime

MOST_OF_MINIMUM = 1.03
GOAL_SETTINGS = {"objective": "rmipo", "batch_size": 128, "tokens_per_microbatch": 8192, "seq_length": 2048}


def meta_policy(arch: ModelArchitecture, num_layers: int, groups: ProcessGroups) -> PolicyModel:
    """The policy without storage."""
    arch = dataclasses.replace(arch, num_layers=num_layers)
    config = transformer_config(arch, groups, dtype=torch.bfloat16, perform_initialization=False)
    policy = build_policy(arch, config, groups, chunk_size=ModelConfig().logprob_chunk_size)
    policy.to("meta")
    return policy


def run_row(policy: PolicyModel, row: PackedRow, *, backward: bool) -> None:
    """Forward, and backward, of one pack."""
    with torch.set_grad_enabled(backward):
        logprobs = policy(
            token_ids=row.token_ids.to("meta"),
            position_ids=row.position_ids.to("meta"),
            segments=row.segments,
            source=row.source.to("meta"),
            target=row.target.to("meta"),
            num_ungraded=row.num_alone_scored,
        )
        if backward:
            logprobs.sum().backward()


def step_flops(arch: ModelArchitecture, batch: RankBatch, groups: ProcessGroups) -> float:
    """Counted FLOPs of the passes over a batch; attention as full squares of a segment's queries and the keys it may see."""

    def passes(num_layers: int) -> None:
        policy = meta_policy(arch, num_layers, groups)
        for row in batch.unconditional:
            run_row(policy, row, backward=False)
        for row in batch.conditional:
            run_row(policy, row, backward=True)

    one, two = (counted_flops(functools.partial(passes, num_layers)) for num_layers in (1, 2))
    return one + (arch.num_layers - 1) * (two - one)


def count(source: str, options: argparse.Namespace, groups: ProcessGroups) -> dict[str, float | str]:
    """A batch of ``--batch-size`` pairs drawn from recorded lengths, as one rank runs it."""
    lengths = cut_lengths(read_lengths(source), options.seq_length)
    rng = np.random.default_rng(options.seed)
    pairs = random_pairs(rng.permutation(lengths)[: options.batch_size], LLAMA_3_8B.vocab_size, rng)
    builder = batch_builder(pairs, LLAMA_3_8B, build_objective(options.objective, {}), options.tokens_per_microbatch)
    batch = builder.build(np.arange(len(pairs)))
    flops = step_flops(LLAMA_3_8B, batch, groups)
    least = minimum_flops(LLAMA_3_8B, pairs, options.objective)
    per_pair = {"flops_per_pair": flops / len(pairs), "minimum_flops_per_pair": least / len(pairs)}
    return {"lengths": source, "pairs": len(pairs), **per_pair, "ratio": flops / least}


def goals(rows: Sequence[dict[str, float | str]]) -> list[Goal]:
    """For each of the recorded lengths, with the settings that the goal was set for."""
    title = "counted FLOPs of a step of Llama-3-8B over the minimum"
    held = [row for row in rows if row["lengths"] in RECORDED and GOAL_SETTINGS.items() <= row.items()]
    return [Goal(f"{title}, {row['lengths']}", MOST_OF_MINIMUM, float(row["ratio"])) for row in held]


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """A line per file of lengths."""
    lines = [f"{'lengths':<16}{'pairs':>7}{'counted TFLOP/pair':>20}{'minimum TFLOP/pair':>20}{'ratio':>8}"]
    for row in rows:
        counted, least = (float(row[name]) / 1e12 for name in ("flops_per_pair", "minimum_flops_per_pair"))
        lines.append(f"{row['lengths']:<16}{row['pairs']:>7}{counted:>20.2f}{least:>20.2f}{row['ratio']:>8.4f}")
    return "\n".join(lines)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_flops", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths", nargs="+", default=list(RECORDED), help="recorded lengths or files, as of bench_step (default: %(default)s)"
    )
    parser.add_argument("--objective", choices=("rmipo", "simpo"), default="rmipo", help="default: %(default)s")
    for name, default, meaning in (
        ("batch-size", 128, "pairs of the batch"),
        ("tokens-per-microbatch", 8192, "most tokens of one pack"),
        ("seq-length", 2048, "cut lengths so that prompt and response fit"),
        ("seed", 1, "of the choice of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_flops.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, show, append."""
    options = parse_options(argv)
    groups = initialize_runtime(1, 1, seed=options.seed)
    settings = {
        name: getattr(options, name) for name in ("objective", "batch_size", "tokens_per_microbatch", "seq_length", "seed")
    }
    rows = [settings | count(source, options, groups) for source in options.lengths]
    shutdown_runtime()
    return report(options, "flops", table(rows), rows, goals(rows))


if __name__ == "__main__":
    sys.exit(main())
