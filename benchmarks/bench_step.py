"""One optimizer step, ours beside a plain padded implementation on transformers, and beside TRL's trainer where asked for.

    python -m benchmarks.bench_step [--lengths ultrafeedback|hh|FILE | --data-path PREFIX] [--objective simpo [--trl]] [--check]

Same weights, same pairs, one process; under torchrun ours is sharded over the ranks (tensor parallelism), of which each runs the
others whole. All take two steps first; losses of every pair and gradient norms must agree, or nothing is
measured. With RMiPO our own step of SimPO is measured, too. See README.md beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import RECORDED, Pairs, read_pairs, save_random_model
from benchmarks.measure import Cost, measure, time_title
from benchmarks.overhead import overhead_share
from benchmarks.report import FOLDER, Goal, add_report_options, report
from benchmarks.sides import Step, build_state, check_agreement, minimum_flops, our_step, padded_step, trl_step
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.torchrun import read_launch
from megatron_rmipo.training.setup import TrainingState

# What the goals were set for: a model of 56 million parameters. The least of what the padded side's CPU time may be, in ours.
GOAL_MODEL = {"hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 8, "vocab_size": 32000}
GOAL_MODEL |= {"num_attention_heads": 8, "num_query_groups": 4}
GOAL_SETTINGS = {
    "objective": "rmipo",
    "shrink": 1,
    "seq_length": 2048,
    "bf16": False,
    "tokens_per_microbatch": 4096,
    "recompute_granularity": None,
    "tensor_model_parallel_size": 1,
    "baseline_pairs_per_microbatch": 2,
    "baseline_recompute": True,
}
GOAL_PAIRS = {"ultrafeedback": 8, "hh": 16}
LEAST_CPU_RATIO = {"ultrafeedback": 3.0, "hh": 2.8}
# RMiPO in SimPO's: how far CPU time may be above the ratio of the FLOPs they cannot do without, and the most of memory.
MOST_CPU_ABOVE_BOUND, MOST_MEMORY = 0.03, 1.01
# Of our step's CPU time, what is neither the model's nor the optimizer's.
MOST_OVERHEAD = 0.01
TITLES = {"baseline": "padded (transformers)", "trl": "TRL's CPOTrainer", "ours": "ours", "simpo": "ours, SimPO"}


def build_steps(
    options: argparse.Namespace, model_dir: Path, pairs: Pairs, groups: ProcessGroups
) -> tuple[dict[str, Step], TrainingState]:
    """Every side's step by name, and our model and optimizer."""
    padded: dict[str, Any] = {"pairs_per_microbatch": options.baseline_pairs_per_microbatch, "bf16": options.bf16}
    recompute = options.baseline_recompute
    steps = {"baseline": padded_step(model_dir, pairs, recompute=recompute, objective=options.objective, **padded)}
    if options.trl:
        steps["trl"] = trl_step(model_dir, pairs, gradient_checkpointing=recompute, output_dir=model_dir, **padded)
    state = build_state(
        read_architecture(model_dir),
        groups,
        bf16=options.bf16,
        recompute_granularity=options.recompute_granularity,
        model_dir=model_dir,
    )
    for name, objective in (("ours", options.objective), ("simpo", "simpo")):
        # One model for both: what a step costs does not depend on its weights.
        if name == "ours" or options.objective == "rmipo":
            steps[name] = our_step(state, pairs, objective, groups, tokens_per_microbatch=options.tokens_per_microbatch)
    return steps, state


def table(costs: Mapping[str, Cost], num_pairs: int) -> str:
    """A line per side; ratios are to ours."""
    ours = costs["ours"]
    lines = [
        f"{'one optimizer step':<24}{'pairs/s':>9}{time_title():>9}{'of ours':>9}{'GFLOP':>10}{'of ours':>9}"
        f"{'MiB':>9}{'of ours':>9}"
    ]
    for name in (name for name in TITLES if name in costs):
        cost = costs[name]
        lines.append(
            f"{TITLES[name]:<24}{num_pairs / cost.seconds.p50:>9.2f}"
            f"{cost.time.p50:>9.2f}{cost.time.p50 / ours.time.p50:>8.2f}x"
            f"{cost.flops / 1e9:>10.1f}{cost.flops / ours.flops:>8.2f}x"
            f"{cost.peak_bytes / 2**20:>9.1f}{cost.peak_bytes / ours.peak_bytes:>8.2f}x"
        )
    return "\n".join(lines)


def record(
    options: argparse.Namespace,
    pairs: Pairs,
    costs: Mapping[str, Cost],
    minimum: Mapping[str, float],
    agreement: float,
    overhead: float,
) -> dict[str, Any]:
    """What was measured and with which settings.

    Args:
        options: the command line's.
        pairs: of the step.
        costs: by side.
        minimum: by objective, FLOPs that a rank of ours cannot do without.
        agreement: the largest relative difference found.
        overhead: share of our step outside model and optimizer.
    """
    names = ["hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "vocab_size"]
    names += ["bf16", "recompute_granularity", "baseline_recompute", "tokens_per_microbatch", "baseline_pairs_per_microbatch"]
    names += ["shrink", "seq_length", "repeats", "tensor_model_parallel_size"]
    row: dict[str, Any] = {"objective": options.objective} | {name: getattr(options, name) for name in names}
    row["lengths"] = options.data_path or (Path(options.lengths).name if options.lengths else "drawn")
    row["pairs"], row["tokens"], row["agreement"] = len(pairs), int(pairs.lengths.sum()), agreement
    for name, cost in costs.items():
        row.update({f"{name}_{figure}": value for figure, value in cost.figures().items()})
    row["minimum_flops"], row["overhead_share"] = minimum[options.objective], overhead
    if options.trl:
        row["trl"] = version("trl")
    return row | ({"simpo_minimum_flops": minimum["simpo"]} if "simpo" in costs else {})


def goals(options: argparse.Namespace, costs: Mapping[str, Cost], minimum: Mapping[str, float], overhead: float) -> list[Goal]:
    """What an RMiPO step of one model over recorded lengths, as they are, was to reach beside the authors' layout.

    CPU time is not held with CUDA, where the CPU only waits.
    """
    as_meant = {**GOAL_MODEL, **GOAL_SETTINGS, "num_pairs": GOAL_PAIRS.get(options.lengths)}
    if not as_meant.items() <= vars(options).items():
        return []
    ours, simpo, bound = costs["ours"], costs["simpo"], minimum["rmipo"] / minimum["simpo"]
    title = f"step of 56M parameters, {options.lengths}"
    ratio = costs["baseline"].cpu_seconds.p50 / ours.cpu_seconds.p50
    above = ours.cpu_seconds.p50 / simpo.cpu_seconds.p50
    held = [Goal(f"{title}: peak memory, RMiPO over SimPO", MOST_MEMORY, ours.peak_bytes / simpo.peak_bytes)]
    if torch.cuda.is_available():
        return held
    return [
        Goal(f"{title}: CPU time, authors' layout over ours", LEAST_CPU_RATIO[options.lengths], ratio, at_least=True),
        Goal(f"{title}: CPU time, RMiPO over SimPO", bound + MOST_CPU_ABOVE_BOUND, above),
        Goal(f"{title}: share of CPU time outside model and optimizer", MOST_OVERHEAD, overhead),
        *held,
    ]


def add_model_options(parser: argparse.ArgumentParser, defaults: Mapping[str, int | None]) -> None:
    """A flag for each of the names, all of them numbers."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-path", metavar="PREFIX", help="prepared pairs (tools/preprocess_preferences.py)")
    source.add_argument(
        "--lengths",
        metavar=f"{'|'.join(RECORDED)}|FILE",
        help="recorded lengths, or jsonl of prompt_len, chosen_len, rejected_len; tokens are random",
    )
    parser.add_argument("--objective", choices=["rmipo", "simpo"], default="rmipo", help="(default: %(default)s)")
    parser.add_argument(
        "--trl", action="store_true", help="with --objective simpo: TRL's CPOTrainer, too (needs the extra bench)"
    )
    parser.add_argument("--shrink", type=float, default=1.0, help="divide lengths by this (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=16, help="pairs of the step (default: %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, default=2048, help="cut lengths so that prompt and response fit (default: %(default)s)"
    )
    sizes = {"hidden-size": 256, "ffn-hidden-size": 896, "num-layers": 4, "num-attention-heads": 8, "num-query-groups": 4}
    sizes |= {"vocab-size": 4096, "tokens-per-microbatch": 4096, "baseline-pairs-per-microbatch": 2, "repeats": 3}
    add_model_options(parser, sizes | {"threads": 1, "seed": 1})
    parser.add_argument("--bf16", action="store_true", help="bf16 compute over fp32 weights, all sides")
    parser.add_argument("--recompute-granularity", choices=["full"], help="recompute activations, our side")
    parser.add_argument(
        "--baseline-recompute",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations, the other sides, as the authors' recipe does (default: %(default)s)",
    )
    add_report_options(parser, FOLDER / "results.csv")
    options = parser.parse_args(argv)
    if options.trl and options.objective != "simpo":
        parser.error("--trl: TRL has no RMiPO. Add --objective simpo")
    options.tensor_model_parallel_size = read_launch().world_size
    if options.trl and options.tensor_model_parallel_size > 1:
        parser.error("--trl: TRL's trainer would spread its batch over the ranks. Leave torchrun out")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, show, append; under torchrun every rank, of which the first reports."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    pairs = read_pairs(options)
    with tempfile.TemporaryDirectory() as folder:
        # Before the ranks are connected: after that, transformers lets the first alone write.
        save_random_model(options, Path(folder))
        groups = initialize_runtime(options.tensor_model_parallel_size, 1, seed=options.seed)
        steps, state = build_steps(options, Path(folder), pairs, groups)
        arch = read_architecture(Path(folder))
    minimum = {name: minimum_flops(arch, pairs, name) / groups.tp_size for name in ("rmipo", "simpo")}
    others = {TITLES[name]: step for name, step in steps.items() if name in ("baseline", "trl")}
    agreement = check_agreement(steps["ours"], others, tolerance=3e-2 if options.bf16 else 1e-4)
    costs = measure(steps, options.repeats)
    overhead = overhead_share(steps["ours"], state)
    is_first = groups.rank == 0
    shutdown_runtime()
    if not is_first:
        return 0
    title = f"{options.objective}, {len(pairs)} pairs, {pairs.lengths.sum()} tokens; results agree to {agreement:.1e}"
    if groups.tp_size > 1:
        title += f"; ours at TP {groups.tp_size}, a rank's figures"
    outside = f"of our CPU time outside model and optimizer: {overhead:.2%}"
    return report(
        options,
        "step",
        f"{title}\n{table(costs, len(pairs))}\n{outside}",
        [record(options, pairs, costs, minimum, agreement, overhead)],
        goals(options, costs, minimum, overhead),
    )


if __name__ == "__main__":
    sys.exit(main())
