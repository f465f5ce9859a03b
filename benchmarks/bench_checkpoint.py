"""What a checkpoint costs each data-parallel rank: memory, bytes written and read, and how long a save holds the steps up.

    python -m benchmarks.bench_checkpoint [--dp 1 2 4] [--repeats 3] [--directory DIR] [--check]

Real ranks over gloo, TP 1, the distributed optimizer, fp32. Each figure of a rank is held against its share: the checkpoint's
bytes over the number of ranks. Memory is the rank's peak resident set during the call, above what was resident before; what
processes forked by it share with it is counted once. Bytes written are those of the rank's files, bytes read those that the
kernel counts for the rank (``rchar``), whatever the page cache has. The digests are not compared before the load, which is one
more reading of the files, shared out among the hosts. The stall is the time of the call that saves; in the background the
rest is written beside whatever comes next, here nothing. It reads /proc: Linux alone. See README.md beside it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

import dataclasses

import torch.distributed as dist

from benchmarks.inputs import LLAMA_3_8B
from benchmarks.measure import Spread
from benchmarks.ranks import run_ranks
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import CheckpointSaver
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.model.build import build_model
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state

MOST_OVER_SHARE = 1.2
_FIGURES = ("memory_save", "memory_load", "written", "read")


def build_state(options: argparse.Namespace, groups: ProcessGroups) -> TrainingState:
    """A model with the optimizer's state of one step."""
    arch = dataclasses.replace(
        LLAMA_3_8B,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_hidden_size,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=options.hidden_size // 8,
        vocab_size=options.vocab_size,
    )
    config = Config(parallel=ParallelConfig(use_distributed_optimizer=True))
    state = build_training_state(build_model(arch, config, groups), config, groups, train_iters=1000)
    for parameter in state.model.parameters():
        parameter.main_grad.copy_(parameter.detach().sin())
    state.optimizer.step()
    return state


def resident(field: str) -> int:
    """Bytes of this process's resident set: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def memory_above(call: Callable[[], Any]) -> int:
    """Peak bytes resident during a call above those before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def bytes_read() -> int:
    """Bytes this process has read so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def measure_rank(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of this rank, the stalls in seconds by ``sync`` and ``background``."""
    groups = initialize_runtime()
    state = build_state(options, groups)
    stored: dict[str, Any] = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler}
    found: dict[str, Any] = {}
    for way in ("background", "sync"):
        stalls = []
        with CheckpointSaver(groups, in_background=way == "background") as saver:
            nothing: dict[str, Any] = {"train_state": {}, "config": {}, "assets_dir": None}
            save = functools.partial(saver.save, directory / way, **stored, **nothing, keep_last=1)
            # What lies where is agreed upon in the first two.
            for step in range(1, 3 + options.repeats):
                dist.barrier()
                started = time.perf_counter()
                save(step)
                stalls.append(time.perf_counter() - started)
                saver.wait()
            dist.barrier()
            found[f"memory_{way}"] = memory_above(lambda save=save: save(3 + options.repeats))
            saver.wait()
        found[f"stall_{way}"] = stalls[2:]
    found["memory_save"] = found.pop("memory_sync")
    path = next((directory / "sync").glob("iter_*"))
    found["written"] = sum(file.stat().st_size for file in path.glob(f"__{groups.rank}_*.distcp"))
    found["total"] = sum(file.stat().st_size for file in path.glob("*.distcp"))
    before = bytes_read()
    load = functools.partial(load_checkpoint, directory / "sync", **stored, load_rng=True, groups=groups, verify=False)
    found["memory_load"] = memory_above(load)
    found["read"] = bytes_read() - before
    found["parameters"] = sum(parameter.numel() for parameter in state.model.parameters())
    shutdown_runtime()
    return found


def measure_world(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the rank that comes off worst, over its share.

    Raises:
        SystemExit: a rank failed.
    """
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench_checkpoint_") as name:
        return make_row(run_ranks(measure_rank, size, options, Path(name)))


def make_row(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a world, of its ranks' :func:`measure_rank`."""
    size = len(found)
    share = found[0]["total"] / size
    row: dict[str, Any] = {"dp": size, "parameters": found[0]["parameters"], "checkpoint_bytes": found[0]["total"]}
    for name in (*_FIGURES, "memory_background"):
        row[f"{name}_bytes"] = max(one[name] for one in found)
        row[f"{name}_over_share"] = row[f"{name}_bytes"] / share
    for way in ("sync", "background"):
        # A save holds up as long as the slowest rank.
        spread = Spread.of([max(times) for times in zip(*(one[f"stall_{way}"] for one in found), strict=True)])
        row.update({f"stall_{way}_{part}": value for part, value in dataclasses.asdict(spread).items()})
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per number of ranks; the worst rank over its share, seconds of a save."""
    titles = "".join(f"{name:>13}" for name in (*_FIGURES, "memory beside"))
    lines = [f"{'DP':>3}{'share MB':>10}{titles}{'stall s':>9}{'beside':>8}"]
    for row in rows:
        ratios = "".join(f"{row[f'{name}_over_share']:>13.3f}" for name in (*_FIGURES, "memory_background"))
        share = row["checkpoint_bytes"] / row["dp"] / 1e6
        lines.append(f"{row['dp']:>3}{share:>10.1f}{ratios}{row['stall_sync_p50']:>9.2f}{row['stall_background_p50']:>8.2f}")
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """At two ranks and more."""
    return [
        Goal(f"checkpoint, DP {row['dp']}: {name.replace('_', ' of a ')}, worst rank over its share", MOST_OVER_SHARE, measured)
        for row in rows
        if row["dp"] > 1
        for name in _FIGURES
        for measured in [row[f"{name}_over_share"]]
    ]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_checkpoint", allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4], help="data-parallel ranks (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to save for the while (default: %(default)s)"
    )
    for name, default, meaning in (
        ("num-layers", 6, "layers of the model"),
        ("hidden-size", 384, "its hidden size"),
        ("ffn-hidden-size", 1056, "its feed-forward size"),
        ("vocab-size", 12000, "its vocabulary"),
        ("repeats", 3, "saves that are timed, after two"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_checkpoint.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Save, load, show, append."""
    options = parse_options(argv)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "repeats")
    settings = {"form": "in shares"} | {name: getattr(options, name) for name in names}
    rows = [settings | measure_world(size, options) for size in options.dp]
    return report(options, "checkpoint", table(rows), rows, goals(rows))


if __name__ == "__main__":
    sys.exit(main())
