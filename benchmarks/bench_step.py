"""One RMiPO optimizer step, ours beside a plain padded implementation on transformers: same weights, same pairs, one process.

    python -m benchmarks.bench_step [--lengths FILE | --data-path PREFIX] [--hidden-size 256 ...]

Both take two steps first; losses of every pair and gradient norms must agree, or nothing is measured. See README.md beside it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.inputs import BOS, Pairs, read_pairs, save_random_model
from benchmarks.measure import Cost, counted_flops, peak_bytes, timed
from benchmarks.padded_baseline import PaddedBaseline, StepResult
from megatron_rmipo.checkpoint.hf import load_hf_weights
from megatron_rmipo.config import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.data.collection import PairCollection
from megatron_rmipo.data.loader import BatchBuilder, BatchLayout
from megatron_rmipo.model.families import read_architecture
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.training.flops import forward_cost_model
from megatron_rmipo.training.setup import build_model, build_training_state
from megatron_rmipo.training.step import train_step

LEARNING_RATE = 1e-4
DEFAULT_CSV = Path(__file__).parent / "results.csv"
Step = Callable[[], StepResult]


def build_ours(options: argparse.Namespace, model_dir: Path, pairs: Pairs) -> Step:
    """The trainer's own step, cut and laid out anew each time."""
    config = Config(
        model=ModelConfig(bf16=options.bf16, recompute_granularity=options.recompute_granularity, **_recompute(options)),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant"),
    )
    groups = initialize_runtime(1, 1, seed=options.seed)
    arch = read_architecture(model_dir)
    policy = build_model(arch, config, groups)
    load_hf_weights(policy, model_dir, arch, tp_rank=0, tp_size=1)
    state = build_training_state(policy, config, groups, train_iters=1000)
    objective = build_objective("rmipo", {})
    layout = BatchLayout(
        dp_rank=0,
        dp_size=1,
        tokens_per_microbatch=options.tokens_per_microbatch,
        cost=forward_cost_model(arch),
        unconditional=objective.needs.unconditional,
        bos_token_id=BOS,
    )
    builder = BatchBuilder(PairCollection([pairs]), layout)  # type: ignore[list-item]

    def step() -> StepResult:
        outcome = train_step(state, builder.build(np.arange(len(pairs))), objective, groups)
        return StepResult(outcome.metrics.values["loss"], outcome.grad_norm)

    return step


def _recompute(options: argparse.Namespace) -> dict[str, Any]:
    full = options.recompute_granularity == "full"
    return {"recompute_method": "uniform", "recompute_num_layers": 1} if full else {}


def build_baseline(options: argparse.Namespace, model_dir: Path, pairs: Pairs) -> Step:
    """The padded step."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.train()
    if options.recompute_granularity == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    baseline = PaddedBaseline(
        model,
        bos_token_id=BOS,
        pairs_per_microbatch=options.baseline_pairs_per_microbatch,
        bf16=options.bf16,
        learning_rate=LEARNING_RATE,
    )
    rows = [(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]
    return lambda: baseline.step(rows)


def check_agreement(ours: Step, baseline: Step, tolerance: float) -> float:
    """Two steps of each, compared pair by pair; the largest relative difference.

    Raises:
        SystemExit: they differ by more than ``tolerance``.
    """
    worst = 0.0
    for number in (1, 2):
        mine, theirs = ours(), baseline()
        losses = ((mine.losses - theirs.losses).abs() / theirs.losses.abs().clamp(min=1e-3)).max().item()
        norms = abs(mine.grad_norm - theirs.grad_norm) / theirs.grad_norm
        worst = max(worst, losses, norms)
        if not worst <= tolerance:
            raise SystemExit(
                f"step {number}: ours and the baseline do not agree (losses {losses:.1e}, gradient norm {norms:.1e}, "
                f"tolerance {tolerance:.0e}): nothing measured"
            )
    return worst


def measure(steps: dict[str, Step], repeats: int) -> dict[str, Cost]:
    """Costs of both, timed in turns so that a busy machine is busy for both; medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step))
    return {
        name: Cost(
            seconds=statistics.median(wall for wall, _ in times[name]),
            cpu_seconds=statistics.median(cpu for _, cpu in times[name]),
            flops=counted_flops(step),
            peak_bytes=peak_bytes(step),
        )
        for name, step in steps.items()
    }


def table(costs: dict[str, Cost], num_pairs: int) -> str:
    """Both beside each other, and how many times better ours is."""
    ours, baseline = costs["ours"], costs["baseline"]
    lines = [f"{'one optimizer step':<28}{'baseline':>12}{'ours':>12}{'ratio':>9}"]

    def row(title: str, theirs: float, mine: float, ratio: float, form: str) -> None:
        lines.append(f"{title:<28}{theirs:>12{form}}{mine:>12{form}}{ratio:>8.2f}x")

    row("pairs per second", num_pairs / baseline.seconds, num_pairs / ours.seconds, baseline.seconds / ours.seconds, ".2f")
    row("CPU seconds", baseline.cpu_seconds, ours.cpu_seconds, baseline.cpu_seconds / ours.cpu_seconds, ".2f")
    row("counted GFLOP", baseline.flops / 1e9, ours.flops / 1e9, baseline.flops / ours.flops, ".1f")
    row(
        "peak MiB above the weights",
        baseline.peak_bytes / 2**20,
        ours.peak_bytes / 2**20,
        baseline.peak_bytes / ours.peak_bytes,
        ".1f",
    )
    return "\n".join(lines)


def append_csv(path: Path, options: argparse.Namespace, pairs: Pairs, costs: dict[str, Cost], agreement: float) -> None:
    """One line of everything that was measured and what with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformers": transformers.__version__,
    }
    names = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "vocab_size")
    names += ("bf16", "recompute_granularity", "tokens_per_microbatch", "baseline_pairs_per_microbatch", "shrink", "repeats")
    record.update({name: getattr(options, name) for name in names})
    record["lengths"] = options.data_path or (options.lengths.name if options.lengths else "drawn")
    record["pairs"], record["tokens"] = len(pairs), int(pairs.lengths.sum())
    record["agreement"] = f"{agreement:.1e}"
    for name, cost in costs.items():
        record.update({f"{name}_{field}": f"{value:.6g}" for field, value in dataclasses.asdict(cost).items()})
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(record))
        if is_new:
            writer.writeheader()
        writer.writerow(record)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-path", metavar="PREFIX", help="prepared pairs (tools/preprocess_preferences.py)")
    source.add_argument(
        "--lengths", type=Path, metavar="FILE", help="jsonl of prompt_len, chosen_len, rejected_len; tokens are random"
    )
    parser.add_argument("--shrink", type=float, default=1.0, help="divide lengths by this (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=16, help="pairs of the step (default: %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, default=2048, help="cut lengths so that prompt and response fit (default: %(default)s)"
    )
    for name, default in (
        ("hidden-size", 256),
        ("ffn-hidden-size", 896),
        ("num-layers", 4),
        ("num-attention-heads", 8),
        ("num-query-groups", 4),
        ("vocab-size", 4096),
        ("tokens-per-microbatch", 4096),
        ("baseline-pairs-per-microbatch", 4),
        ("repeats", 3),
        ("threads", 1),
        ("seed", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bf16 compute over fp32 weights, both sides")
    parser.add_argument("--recompute-granularity", choices=["full"], help="recompute activations, both sides")
    parser.add_argument("--csv", type=Path, default=DEFAULT_CSV, help="file to append the result to (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, show, append."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    pairs = read_pairs(options)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(options, Path(folder))
        steps = {"baseline": build_baseline(options, Path(folder), pairs), "ours": build_ours(options, Path(folder), pairs)}
    agreement = check_agreement(steps["ours"], steps["baseline"], tolerance=3e-2 if options.bf16 else 1e-4)
    print(f"{len(pairs)} pairs, {pairs.lengths.sum()} tokens; results agree to {agreement:.1e}")
    costs = measure(steps, options.repeats)
    print(table(costs, len(pairs)))
    append_csv(options.csv, options, pairs, costs, agreement)
    print(f"appended to {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
