"""Output layer and log-prob, forward and backward: ours beside dense torch, Megatron's cross entropy, Liger and Apple's.

    python -m benchmarks.bench_logprobs [--tokens 512 2048] [--vocab-size 32000 128256] [--hidden-size 256] [--check]
    torchrun --nproc-per-node 2 -m benchmarks.bench_logprobs       # vocabulary over two ranks; the figures are those of rank 0

All read the same fp32 inputs and give the log-probs and both gradients. Each is compared with float64 first, and not timed where
it is far off. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.head_methods import Method, Problem, methods, random_problem
from benchmarks.measure import Cost, measure, time_title
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.config.schema import ModelConfig
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.torchrun import read_launch

OURS, DENSE = "fused", "dense, all tokens"
# Beyond these a method computes something else, and its cost says nothing.
LARGEST_ERROR, LARGEST_GRADIENT_ERROR = 1e-3, 1e-3
REFERENCE_CHUNK = 128
# What the goals of cost were set for.
PROMISED = {"vocab_size": 128256, "tokens": 2048, "scored_share": 0.6, "chunk_size": ModelConfig().logprob_chunk_size}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Against float64.

    Attributes:
        logprob: largest absolute difference of a log-prob.
        gradient: norm of the difference over the norm, the larger of hidden states' and weight's.
    """

    logprob: float
    gradient: float


def forward_backward(method: Method, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs ``[N]``, gradient of the hidden states ``[T, H]``, gradient of this rank's weight)."""
    logprobs = method(problem)
    hidden_grad, weight_grad = torch.autograd.grad(logprobs, (problem.hidden, problem.weight), problem.grad)
    return logprobs.detach(), hidden_grad, weight_grad


def float64_reference(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The same from dense float64, some tokens at a time, the whole vocabulary on every rank."""
    size, rank = problem.group.size(), problem.group.rank()
    shards = [torch.empty_like(problem.weight) for _ in range(size)]
    torch.distributed.all_gather(shards, problem.weight.detach(), group=problem.group)
    weight = torch.cat(shards).double().requires_grad_()
    hidden_grad, weight_grad = torch.zeros_like(problem.hidden, dtype=torch.float64), torch.zeros_like(weight)
    parts = []
    for scored, grad in zip(problem.scored.split(REFERENCE_CHUNK), problem.grad.split(REFERENCE_CHUNK), strict=True):
        hidden = problem.hidden.detach()[scored].double().requires_grad_()
        logprobs = torch.log_softmax(hidden @ weight.t(), dim=-1).gather(-1, problem.target[scored][:, None])[:, 0]
        hidden_grad[scored], part = torch.autograd.grad(logprobs, (hidden, weight), grad.double())
        weight_grad += part
        parts.append(logprobs.detach())
    return torch.cat(parts), hidden_grad, weight_grad.chunk(size)[rank]


def errors_of(method: Method, problem: Problem, reference: tuple[Tensor, Tensor, Tensor]) -> Errors:
    """One run against float64."""
    found = forward_backward(method, problem)
    gradients = [
        float(torch.linalg.vector_norm(mine - exact) / torch.linalg.vector_norm(exact))
        for mine, exact in zip(found[1:], reference[1:], strict=True)
    ]
    return Errors(float((found[0] - reference[0]).abs().max()), max(gradients))


def measure_case(problem: Problem, repeats: int) -> dict[str, tuple[Errors, Cost]]:
    """Errors and costs of every method by name.

    Raises:
        SystemExit: ours is far from float64.
    """
    reference = float64_reference(problem)
    errors = {name: errors_of(method, problem, reference) for name, method in methods(problem.group.size()).items()}
    del reference
    far = {name for name, one in errors.items() if not (one.logprob < LARGEST_ERROR and one.gradient < LARGEST_GRADIENT_ERROR)}
    for name in sorted(far):
        print(f"{name}: not timed, it is far from float64: {errors[name]}", file=sys.stderr)
    if OURS in far:
        raise SystemExit("ours is far from float64: nothing measured")
    calls = {
        name: functools.partial(forward_backward, method, problem)
        for name, method in methods(problem.group.size()).items()
        if name not in far
    }
    return {name: (errors[name], cost) for name, cost in measure(calls, repeats).items()}


def table(title: str, results: dict[str, tuple[Errors, Cost]]) -> str:
    """A line per method; ratios are to ours."""
    ours = results[OURS][1]
    lines = [
        title,
        f"  {'':<26}{time_title():>8}{'of ours':>9}{'MiB':>9}{'of ours':>9}{'GFLOP':>9}"
        f"{'log-prob error':>16}{'gradient error':>16}",
    ]
    for name, (errors, cost) in results.items():
        lines.append(
            f"  {name:<26}{cost.time.p50:>8.2f}{cost.time.p50 / ours.time.p50:>8.2f}x"
            f"{cost.peak_bytes / 2**20:>9.0f}{cost.peak_bytes / ours.peak_bytes:>8.2f}x{cost.flops / 1e9:>9.0f}"
            f"{errors.logprob:>16.1e}{errors.gradient:>16.1e}"
        )
    return "\n".join(lines)


def goals(settings: dict[str, Any], results: dict[str, tuple[Errors, Cost]]) -> list[Goal]:
    """Errors are held in every case, cost where it was promised; CPU time not with CUDA, where the CPU only waits."""
    errors, ours = results[OURS]
    title = (
        f"log-probs, V {settings['vocab_size']}, T {settings['tokens']}, H {settings['hidden_size']}, "
        f"{settings['scored_share']:g} scored, chunk {settings['chunk_size']}, TP {settings['tensor_model_parallel_size']}"
    )
    held = [
        Goal(f"{title}: log-prob error", 1e-5, errors.logprob),
        Goal(f"{title}: gradient relative error", 2e-6, errors.gradient),
    ]
    if DENSE in results and PROMISED.items() <= settings.items():
        dense = results[DENSE][1]
        held.append(Goal(f"{title}: peak memory, dense over ours", 7.0, dense.peak_bytes / ours.peak_bytes, at_least=True))
        if not torch.cuda.is_available():
            held.append(Goal(f"{title}: CPU time, ours over dense", 0.55, ours.cpu_seconds.p50 / dense.cpu_seconds.p50))
    return held


def make_rows(settings: dict[str, Any], results: dict[str, tuple[Errors, Cost]]) -> list[dict[str, Any]]:
    """A row for each method."""
    return [
        settings | {"method": name, "logprob_error": errors.logprob, "gradient_error": errors.gradient} | cost.figures()
        for name, (errors, cost) in results.items()
    ]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_logprobs", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    for name, defaults, meaning in (
        ("tokens", [2048], "tokens of a row"),
        ("vocab-size", [128256], "whole vocabulary; every number is tried with every number of tokens"),
        ("hidden-size", [256], "hidden size; likewise"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=defaults, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--scored-share", type=float, default=0.6, help="of the tokens (default: %(default)s)")
    for name, default, meaning in (
        ("logprob-chunk-size", ModelConfig().logprob_chunk_size, "vocabulary entries whose logits exist at a time in ours"),
        ("repeats", 3, "timed calls of each"),
        ("threads", 1, "of torch"),
        ("seed", 1, "of the inputs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_logprobs.csv")
    options = parser.parse_args(argv)
    if not 0 < options.scored_share <= 1:
        parser.error(f"--scored-share {options.scored_share}: must lie above 0 and be 1 at most")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, measure, show, append; under torchrun every rank, of which the first reports."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    groups = initialize_runtime(read_launch().world_size, 1, seed=options.seed)
    tables, rows, held = [], [], []
    for tokens, vocab_size, hidden_size in itertools.product(options.tokens, options.vocab_size, options.hidden_size):
        if vocab_size % groups.tp_size:
            raise SystemExit(f"--vocab-size {vocab_size}: must be a multiple of the number of ranks, {groups.tp_size}")
        settings = {"tokens": tokens, "vocab_size": vocab_size, "hidden_size": hidden_size}
        settings |= {"scored_share": options.scored_share, "chunk_size": options.logprob_chunk_size}
        results = measure_case(random_problem(**settings, group=groups.tp, seed=options.seed), options.repeats)
        settings |= {"tensor_model_parallel_size": groups.tp_size, "repeats": options.repeats}
        tables.append(table(", ".join(f"{name} {value}" for name, value in settings.items()), results))
        rows += make_rows(settings, results)
        held += goals(settings, results)
    is_first = groups.rank == 0
    shutdown_runtime()
    return report(options, "logprobs", "\n".join(tables), rows, held) if is_first else 0


if __name__ == "__main__":
    sys.exit(main())
