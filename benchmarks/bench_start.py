"""What reading a Hugging Face model costs at the start: each rank all of its slices, or its share of them (--hf-read).

    python -m benchmarks.bench_start [--ranks 2 8] [--tp 1 2] [--repeats 5] [--directory DIR] [--check]

Real ranks over gloo on this machine, a random Llama in bf16, all ranks beyond TP data-parallel. Bytes read are those asked of the
files of weights, whatever the page cache has, headers aside; CPU seconds are of all threads of a rank, over all ranks, with the
sending; both ways are timed in turns, from when all ranks are ready until the last is done. The files are in the page cache: on a
file system that many hosts share the bytes are what counts. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint_files import plan_weights, write_config, write_random_weights
from benchmarks.measure import Spread
from benchmarks.ranks import run_ranks
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

WAYS = ("each", "broadcast")
MOST_OVER_ONE_READING = 1.01
MODEL = "model"


def bytes_asked(load: Any) -> int:
    """Bytes that a call asks of files of weights."""
    asked = [0]
    read, read_lines = WeightFiles.read, WeightFiles.read_lines

    def counted(files: WeightFiles, name: str, start: int, rows: Tensor, *columns: slice) -> None:
        asked[0] += rows.numel() * files.tensors[name].dtype.itemsize
        read(files, name, start, rows, *columns)

    def counted_lines(files: WeightFiles, name: str, start: int, lines: Tensor) -> None:
        asked[0] += lines.nbytes
        read_lines(files, name, start, lines)

    with mock.patch.multiple(WeightFiles, read=counted, read_lines=counted_lines):
        load()
    return asked[0]


def measure_rank(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Of this rank, by way: bytes read, CPU seconds and seconds of each repetition."""
    groups = initialize_runtime(options.tensor_model_parallel_size)
    arch = read_architecture(directory / MODEL)
    parallel = ParallelConfig(tensor_model_parallel_size=options.tensor_model_parallel_size)
    model = build_model(arch, Config(parallel=parallel, model=ModelConfig(bf16=True)), groups)
    found: dict[str, Any] = {way: {"cpu_seconds": [], "seconds": []} for way in WAYS}
    for repetition in range(options.repeats + 1):
        for way in WAYS:
            dist.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            asked = bytes_asked(lambda way=way: load_hf_weights(model, directory / MODEL, arch, groups=groups, read=way))
            dist.barrier()
            if repetition:  # the first one meets connections that are not there yet
                found[way]["cpu_seconds"].append(time.process_time() - cpu)
                found[way]["seconds"].append(time.perf_counter() - started)
            found[way]["read"] = asked
    shutdown_runtime()
    return found


def measure_world(size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, of a new model.

    Raises:
        SystemExit: a rank failed.
    """
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench_start_") as name:
        model = Path(name) / MODEL
        write_config(model, vars(options))
        plan = plan_weights(model)
        write_random_weights(model, plan, 1e9, seed=1)
        num_bytes = sum(tensor.num_bytes for tensor in plan)
        return make_rows(run_ranks(measure_rank, size, options, Path(name)), num_bytes)


def make_rows(found: Sequence[dict[str, Any]], num_bytes: int) -> list[dict[str, Any]]:
    """The figures of a world, of its ranks' :func:`measure_rank`; sums over the ranks, seconds until the last was done."""
    rows = []
    for way in WAYS:
        of_way = [one[way] for one in found]
        read = sum(one["read"] for one in of_way)
        row: dict[str, Any] = {"hf_read": way, "ranks": len(found), "model_bytes": num_bytes, "read_bytes": read}
        row["read_over_model"] = read / num_bytes
        for name, reduce in (("cpu_seconds", sum), ("seconds", max)):
            spread = Spread.of([reduce(times) for times in zip(*(one[name] for one in of_way), strict=True)])
            row.update({f"{name}_{part}": value for part, value in dataclasses.asdict(spread).items()})
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per number of ranks and way."""
    lines = [f"{'ranks':>5}{'TP':>4}  {'--hf-read':<11}{'read MB':>9}{'/ model':>9}{'CPU s':>8}{'s':>8}"]
    for row in rows:
        lines.append(
            f"{row['ranks']:>5}{row['tensor_model_parallel_size']:>4}  {row['hf_read']:<11}{row['read_bytes'] / 1e6:>9.1f}"
            f"{row['read_over_model']:>9.3f}{row['cpu_seconds_p50']:>8.2f}{row['seconds_p50']:>8.2f}"
        )
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """The model is read once, however many replicas there are."""
    return [
        Goal(
            f"start, {row['ranks']} ranks, TP {row['tensor_model_parallel_size']}: bytes read with --hf-read broadcast / model's",
            # Norms are read once a shard.
            MOST_OVER_ONE_READING,
            row["read_over_model"],
        )
        for row in rows
        if row["hf_read"] == "broadcast"
    ]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_start", allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="ranks (default: %(default)s)")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="of which share a layer (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="for the model (default: %(default)s)"
    )
    for name, default, meaning in (
        ("num-layers", 8, "layers of the model"),
        ("hidden-size", 768, "its hidden size"),
        ("ffn-hidden-size", 2048, "its feed-forward size"),
        ("num-attention-heads", 12, "its attention heads"),
        ("num-query-groups", 4, "its key/value heads"),
        ("vocab-size", 32000, "its vocabulary"),
        ("repeats", 5, "times each way is timed, after one"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_start.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Load, show, append."""
    options = parse_options(argv)
    rows = []
    for tp in options.tp:
        options.tensor_model_parallel_size = tp
        names = ("tensor_model_parallel_size", "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "repeats")
        settings = {name: getattr(options, name) for name in names}
        rows += [settings | row for size in options.ranks if size >= tp for row in measure_world(size, options)]
    return report(options, "start", table(rows), rows, goals(rows))


if __name__ == "__main__":
    sys.exit(main())
