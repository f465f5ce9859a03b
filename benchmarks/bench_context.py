"""What one rank holds of a pair of 100,000 tokens, forward and backward, where several ranks share its row.

    python -m benchmarks.bench_context [--context-parallel-size 1 4 8] [--check]

The first rank of each layout is run, in groups that are pretended: what others would send it is memory as it is found, of the
size that it would have. The model is narrow and has few layers; tokens are real in number. Bytes are counted as torch's allocator
is asked for them. See README.md beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.measure import peak_bytes
from benchmarks.report import FOLDER, Goal, add_report_options, report
from benchmarks.scale_world import Layout, pretended_world
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.data.batches.packing import PackedRow, pack_pairs
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.model.build import build_model
from megatron_rmipo.passes.rows import row_output

# Of what it would be if every rank held its part and nothing else.
LEAST_SHARE = 0.9


def architecture(options: argparse.Namespace) -> ModelArchitecture:
    """A Llama of these sizes, with heads of 16 channels, two to one of keys and values."""
    hidden, longest = options.hidden_size, options.prompt + options.response
    heads = hidden // 16
    sizes = (options.num_layers, hidden, 8 * hidden // 3, heads, max(1, heads // 2), 16)
    return ModelArchitecture("llama", *sizes, 512, longest, (Rope(1e6),), 1e-5)


def pair_row(options: argparse.Namespace, multiple_of: int) -> PackedRow:
    """One pair of random tokens, as a rule with its prompt before each response.

    Of a shared one torch's kernels on the CPU keep a mask of all scores, at CP 1 alone, which would look worse than it is.
    """
    random = np.random.default_rng(options.seed)
    tokens = [random.integers(3, 512, size) for size in (options.prompt, options.response, options.response)]
    return pack_pairs([TokenizedPair(*tokens)], [0], share_prompts=options.share_prompts, multiple_of=multiple_of)


def measure(cp_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the first of so many ranks."""
    layout = Layout(1, 1, 1, cp_size)
    with pretended_world(layout, 0) as groups:
        torch.manual_seed(options.seed)
        config = Config(
            parallel=ParallelConfig(context_parallel_size=cp_size, cp_comm_type=options.cp_comm_type),
            model=ModelConfig(make_vocab_size_divisible_by=8, logprob_chunk_size=64),
        )
        model = build_model(architecture(options), config, groups)[0].train()
        row = pair_row(options, 8 * cp_size)
        # Gradients of weights are there before, as in a run.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        peak = peak_bytes(lambda: row_output(model, row).sum().backward())
    figures = {"tokens": row.num_tokens, "tokens_a_rank": row.num_tokens // cp_size, "peak_bytes": peak}
    return {"context_parallel_size": cp_size, **figures}


def table(rows: Sequence[dict[str, Any]], limit_bytes: float) -> str:
    """A line per layout."""
    lines = [f"{'CP':>3}{'tokens of row':>15}{'of rank':>10}{'peak MiB':>10}{'of CP 1':>9}  within {limit_bytes / 2**20:g} MiB"]
    alone = next((row["peak_bytes"] for row in rows if row["context_parallel_size"] == 1), float("nan"))
    for row in rows:
        share, fits = row["peak_bytes"] / alone, "yes" if row["peak_bytes"] <= limit_bytes else "no"
        lines.append(
            f"{row['context_parallel_size']:>3}{row['tokens']:>15,}{row['tokens_a_rank']:>10,}{row['peak_bytes'] / 2**20:>10.1f}"
            f"{share:>9.3f}  {fits}"
        )
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]], limit_bytes: float) -> list[Goal]:
    """That a rank holds little more than its part, and that the limit is beyond one rank and not beyond most."""
    alone, *shared = sorted(rows, key=lambda row: row["context_parallel_size"])
    if alone["context_parallel_size"] != 1:
        return []
    held = [Goal("a pair of 100k tokens: MiB at CP 1, beyond the limit", limit_bytes / 2**20, alone["peak_bytes"] / 2**20, True)]
    for row in shared:
        cp_size = row["context_parallel_size"]
        ratio = alone["peak_bytes"] / row["peak_bytes"]
        held.append(Goal(f"a pair of 100k tokens: times less at CP {cp_size} than at CP 1", LEAST_SHARE * cp_size, ratio, True))
    if shared:
        held.append(
            Goal("a pair of 100k tokens: MiB at most CP, within the limit", limit_bytes / 2**20, shared[-1]["peak_bytes"] / 2**20)
        )
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_context", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    sizes = [1, 4, 8]
    parser.add_argument(
        "--context-parallel-size", nargs="+", type=int, default=sizes, help="ranks that share the row (default: %(default)s)"
    )
    parser.add_argument("--cp-comm-type", choices=("all_gather", "a2a"), default="all_gather", help="as of the trainer")
    for name, default, meaning in (
        ("prompt", 45_000, "tokens of the prompt"),
        ("response", 5_000, "tokens of each of two responses"),
        ("hidden-size", 32, "of the model, a multiple of 16"),
        ("num-layers", 2, "of the model"),
        ("limit-mib", 200, "what a rank may hold"),
        ("seed", 1, "of weights and tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--share-prompts", action="store_true", help="the prompt stands once for both responses")
    add_report_options(parser, FOLDER / "results_context.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, append."""
    options = parse_options(argv)
    names = ("cp_comm_type", "share_prompts", "prompt", "response", "hidden_size", "num_layers", "limit_mib", "seed")
    settings = {name: getattr(options, name) for name in names}
    rows = [settings | measure(cp_size, options) for cp_size in options.context_parallel_size]
    limit_bytes = options.limit_mib * 2**20
    return report(options, "context", table(rows, limit_bytes), rows, goals(rows, limit_bytes))


if __name__ == "__main__":
    sys.exit(main())
