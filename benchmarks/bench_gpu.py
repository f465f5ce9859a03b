"""Training steps of a Llama-3-8B cut to the layers that one GPU holds: pairs a second, model TFLOP/s, where the time goes.

    python -m benchmarks.bench_gpu [--lengths ultrafeedback|hh|FILE] [--check]
    python -m benchmarks.bench_gpu --num-layers 2 --hidden-size 64 ...       # small enough for a CPU: that everything runs

bf16, random weights, random tokens of recorded lengths. First a model of two layers takes a step beside the padded one; a
difference above bf16's is reported with its size. Then the same batches are trained on in several ways (RMiPO; SimPO; prompts not
shared; a pair to a micro-batch), and by the padded implementation in the authors' setting, activations recomputed. Each figure is
written when it is known; memory that runs out on the padded side costs that side alone.

A step of n layers takes s seconds, of which e do not depend on n: embedding, output layer and loss, measured apart as the passes
of the same step through the model without its layers, and the optimizer's time times the share of the parameters outside the
layers. The whole model of 32 layers would then take ``e + (s - e) * 32 / n`` seconds: "at 32 layers" below. Batches are laid out
before the clock starts, as the trainer's worker processes do. See README.md beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench_step import add_model_options
from benchmarks.gpu_model import FULL_LAYERS, layers_that_fit
from benchmarks.gpu_parts import gradient_parts
from benchmarks.gpu_results import PADDED, SIZES, STEPS, Results, goals, make_rows, table
from benchmarks.gpu_steps import VARIANTS, build_batches, ends_seconds, head_tflops, time_padded, time_steps
from benchmarks.inputs import BOS, RECORDED, Pairs, read_pairs, save_random_model
from benchmarks.padded_baseline import PaddedBaseline
from benchmarks.report import FOLDER, add_report_options, environment, read_rows, report, write_rows
from benchmarks.sides import build_state, differences, minimum_flops, our_step, padded_step, token_lists, trainer_config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.memory.peak import forget_peak_memory, peak_memory_bytes
from megatron_rmipo.runtime.groups import ProcessGroups, current_device, initialize_runtime

T = TypeVar("T")
CHECKED_LAYERS, CHECKED_PAIRS = 2, 8
# Relative, of a pair's loss and of the gradient norm, in bf16.
TOLERANCES = {"simpo": 3e-2, "rmipo": 1e-1}


def check_losses(options: argparse.Namespace, model_dir: Path, pairs: Pairs, groups: ProcessGroups, results: Results) -> None:
    """A step of a model of two layers, ours and padded, for both objectives; the largest relative difference, NaN included.

    One that is above the tolerance is a problem of the results, with its size, and ends nothing.
    """
    arch = read_architecture(model_dir)
    # A sum over a long response gathers bf16's rounding: RMiPO's margin is compared where responses are short.
    shortest = np.argsort(pairs.lengths[:, 1:].sum(1), kind="stable")[:CHECKED_PAIRS]
    compared = {"simpo": Pairs(pairs[:CHECKED_PAIRS]), "rmipo": Pairs([pairs[int(index)] for index in shortest])}
    settings = {"pairs_per_microbatch": options.baseline_pairs_per_microbatch, "bf16": True, "recompute": True}
    for name, tolerance in TOLERANCES.items():
        state = build_state(arch, groups, bf16=True, model_dir=model_dir)
        mine = our_step(state, compared[name], name, groups, tokens_per_microbatch=options.tokens_per_microbatch)()
        del state
        release_memory()
        title = f"{name}: ours and the padded step"
        theirs = attempt(results, title, lambda name=name: padded_step(model_dir, compared[name], objective=name, **settings)())  # type: ignore[misc]
        release_memory()
        if theirs is None:
            continue
        losses, norms = differences(mine, theirs)
        if not (losses <= tolerance and norms <= tolerance):
            problem = f"{title} do not agree: losses {losses:.1e}, gradient norm {norms:.1e}, tolerance {tolerance:.0e}"
            results.problems.append(problem)
        # Not max(), which passes over NaN.
        results.agreement = float(np.max([losses, norms, results.agreement or 0.0]))


def attempt(results: Results, title: str, measure: Callable[[], T]) -> T | None:
    """What ``measure`` gives; None where memory runs out in it, which is a problem of the results and costs this figure alone."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        results.problems.append(f"{title}: not measured, memory ran out: {str(error).splitlines()[0]}")
    # Here, where nothing holds the frames of the failure any more.
    release_memory()
    return None


def choose_layers(options: argparse.Namespace, arch: ModelArchitecture) -> int:
    """``--num-layers``, or those that fit.

    Raises:
        SystemExit: not one does.
    """
    if options.num_layers is not None:
        return int(options.num_layers)
    free, _ = torch.cuda.mem_get_info()
    num_layers = layers_that_fit(arch, trainer_config(bf16=True), free, options.tokens_per_microbatch)
    if not num_layers:
        raise SystemExit(
            f"not one layer fits into {free / 2**30:.0f} GiB: lower --tokens-per-microbatch, or give --num-layers and small sizes"
        )
    return num_layers


def run(options: argparse.Namespace, pairs: Pairs, keep: Callable[[Results], None]) -> Results:
    """Check, then measure every way; ``keep`` is handed the results whenever there are more of them."""
    groups = initialize_runtime(1, 1, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(argparse.Namespace(**{**vars(options), "num_layers": CHECKED_LAYERS}), Path(folder))
        arch, hf_config = read_architecture(Path(folder)), transformers.AutoConfig.from_pretrained(folder)
        results = Results(choose_layers(options, arch))
        check_losses(options, Path(folder), pairs, groups, results)
    hf_config.num_hidden_layers = results.num_layers
    arch = dataclasses.replace(arch, num_layers=results.num_layers)
    timed_pairs = Pairs(pairs[options.warmups * options.num_pairs :])
    results.full_flops = minimum_flops(dataclasses.replace(arch, num_layers=FULL_LAYERS), timed_pairs, "rmipo") / options.repeats
    run_ours(options, arch, pairs, groups, results, keep)
    release_memory()
    padded = attempt(results, PADDED, lambda: run_padded(options, hf_config, pairs))
    if padded is not None:
        results.padded_seconds, results.padded_peak_bytes = padded
        keep(results)
    return results


def run_ours(
    options: argparse.Namespace,
    arch: ModelArchitecture,
    pairs: Pairs,
    groups: ProcessGroups,
    results: Results,
    keep: Callable[[Results], None],
) -> None:
    """Every way of the trainer's, then the ends and the head."""
    state = build_state(arch, groups, bf16=True)
    for name, variant in VARIANTS.items():
        # One way after the other: in turns, a batch would find the attention masks that the way before it made.
        batches = build_batches(pairs, state, variant, options.num_pairs, options.tokens_per_microbatch)
        results.timings[name] = time_steps(state, batches, variant.objective, groups, warmups=options.warmups)
        keep(results)
        results.parts[name] = gradient_parts(state, batches[-1], variant.objective, groups)
        keep(results)
    batches = build_batches(pairs, state, VARIANTS["rmipo"], options.num_pairs, options.tokens_per_microbatch)
    results.ends_seconds = ends_seconds(state, batches, "rmipo", groups, results.timings["rmipo"], warmups=options.warmups)
    keep(results)
    results.head_tflops = head_tflops(state.policy[0], options.head_tokens, options.repeats)
    keep(results)


def run_padded(options: argparse.Namespace, hf_config: Any, pairs: Pairs) -> tuple[list[float], int]:
    """(seconds of each step, peak bytes) of the padded implementation, RMiPO, activations recomputed."""
    with current_device():
        model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf_config, dtype=torch.float32, attn_implementation="sdpa"
        )
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    baseline = PaddedBaseline(
        model, bos_token_id=BOS, pairs_per_microbatch=options.baseline_pairs_per_microbatch, bf16=True, learning_rate=1e-6
    )
    rows = token_lists(pairs)
    forget_peak_memory()
    seconds = time_padded(
        lambda part: baseline.step(rows[part]), options.baseline_batches, options.num_pairs, warmups=options.warmups
    )
    return seconds, peak_memory_bytes()


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_gpu", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths",
        default="ultrafeedback",
        metavar=f"{'|'.join(RECORDED)}|FILE",
        help="recorded lengths, or jsonl of prompt_len, chosen_len, rejected_len; tokens are random (default: %(default)s)",
    )
    parser.add_argument("--shrink", type=float, default=1.0, help="divide lengths by this (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, help="unset: as many as fit into the GPU's memory")
    numbers = {**SIZES, **STEPS, "warmups": 2, "repeats": 5, "baseline_batches": 2, "seed": 1}
    add_model_options(parser, {name.replace("_", "-"): number for name, number in numbers.items()})
    add_report_options(parser, FOLDER / "results_gpu.csv")
    options = parser.parse_args(argv)
    for name in ("num_pairs", "repeats", "baseline_batches", "head_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    if options.baseline_batches > options.repeats:
        parser.error(f"--baseline-batches {options.baseline_batches}: there are no more than --repeats {options.repeats}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, append what is known, show."""
    options = parse_options(argv)
    if not torch.cuda.is_available() and options.num_layers is None:
        raise SystemExit(
            "bench_gpu needs a GPU, and torch finds none here. To see that it runs at all, give small sizes and --num-layers 2."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("bench_gpu measures one GPU: start it without torchrun")
    num_pairs = options.num_pairs * (options.warmups + options.repeats)
    pairs = read_pairs(argparse.Namespace(**{**vars(options), "num_pairs": num_pairs, "data_path": None}))
    if len(pairs) < num_pairs:
        raise SystemExit(
            f"--num-pairs {options.num_pairs}: {options.warmups + options.repeats} steps take {num_pairs} pairs, but --lengths "
            f"{options.lengths} holds {len(pairs)}"
        )
    earlier, facts = read_rows(options.csv), environment()

    def keep(results: Results) -> None:
        # A file that cannot be written is told of at the end, when all is shown.
        with contextlib.suppress(OSError):
            write_rows(options.csv, earlier, [facts | row for row in make_rows(options, results)])

    results = run(options, pairs, keep)
    rows = make_rows(options, results)
    code = report(options, "gpu", table(rows), rows, goals(options, results), earlier)
    for problem in results.problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if options.check and results.problems else code


if __name__ == "__main__":
    sys.exit(main())
