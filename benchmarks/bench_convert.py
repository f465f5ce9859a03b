"""Conversion of a checkpoint, both ways, beside a plain copy of the same files: speed, CPU time, memory.

    python -m benchmarks.bench_convert [--directory DIR] [--num-layers 4] [--hidden-size 2048] [--check]

Hugging Face safetensors, several files of random bits, are converted to a Megatron checkpoint and back. What comes back must be
the same to the bit before anything is timed. Then, in turns, each conversion and a copy (``shutil.copyfile``) of the files that
it reads. Before each, earlier outputs are removed, the machine's dirty pages are flushed (``sync``) and the files are read once,
so that both sides find the same in the page cache. Both end, within the time, with an fsync of every file they wrote; what a
conversion flushes of itself comes on top of that. The time is that of a call in a process that has imported everything; what
starting one costs is told apart.

Peak memory is that of a process of its own, beyond its peak after it converted a tiny model. It is read from /proc: this runs on
Linux alone. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.checkpoint_files import DIRECTIONS, Folders, plan_weights, write_config, write_random_weights
from benchmarks.measure import Spread, timed
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.errors import ConversionError, RmipoError

LEAST_SPEED, MOST_MEMORY = 0.8, 0.25
# Of a smaller checkpoint, making and flushing a handful of files is a good part, whoever does it.
LEAST_GOAL_BYTES = 400e6
TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
}
_STARTUP = "import megatron_rmipo.checkpoint.hf_to_megatron_cli, megatron_rmipo.checkpoint.megatron_to_hf_cli"
_TIMES = ("seconds", "cpu_seconds", "copy_seconds", "copy_cpu_seconds", "speed_over_copy")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What one direction cost, and the copy of the files that it reads.

    Attributes:
        direction: one of ``DIRECTIONS``.
        num_bytes: of the tensors.
        seconds, cpu_seconds: of the conversion; CPU of all threads, the kernel's for them included.
        copy_seconds, copy_cpu_seconds: of the copy.
        speed_over_copy: seconds of a copy over those of the conversion in the same turn.
        peak_bytes: most memory beyond that after a tiny conversion.
    """

    direction: str
    num_bytes: int
    seconds: Spread
    cpu_seconds: Spread
    copy_seconds: Spread
    copy_cpu_seconds: Spread
    speed_over_copy: Spread
    peak_bytes: int

    @classmethod
    def of(
        cls,
        direction: str,
        num_bytes: int,
        conversions: Sequence[tuple[float, float]],
        copies: Sequence[tuple[float, float]],
        peak_bytes: int,
    ) -> Conversion:
        """From (seconds, CPU seconds) of every turn."""
        return cls(
            direction,
            num_bytes,
            seconds=Spread.of([wall for wall, _ in conversions]),
            cpu_seconds=Spread.of([cpu for _, cpu in conversions]),
            copy_seconds=Spread.of([wall for wall, _ in copies]),
            copy_cpu_seconds=Spread.of([cpu for _, cpu in copies]),
            speed_over_copy=Spread.of([copy / wall for (copy, _), (wall, _) in zip(copies, conversions, strict=True)]),
            peak_bytes=peak_bytes,
        )

    @property
    def memory_over_size(self) -> float:
        """Peak over the size of the tensors."""
        return self.peak_bytes / self.num_bytes

    def gigabytes_per_second(self, seconds: Spread) -> float:
        """The median speed of either side."""
        return self.num_bytes / 1e9 / seconds.p50

    def row(self) -> dict[str, Any]:
        """Every figure by its name."""
        row: dict[str, Any] = {"direction": self.direction, "num_bytes": self.num_bytes}
        for name in _TIMES:
            row.update({f"{name}_{part}": value for part, value in dataclasses.asdict(getattr(self, name)).items()})
        speeds = {f"{side}gb_per_second": self.gigabytes_per_second(getattr(self, f"{side}seconds")) for side in ("", "copy_")}
        return row | speeds | {"peak_bytes": self.peak_bytes, "memory_over_size": self.memory_over_size}


def peak_beyond_tiny(direction: str, tiny: Folders, whole: Folders) -> int:
    """Bytes by which the peak memory of a new process grows with a conversion, after one of a tiny model."""
    peaks = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for folders in (tiny, whole):
            shutil.rmtree(folders.output, ignore_errors=True)
            pool.submit(folders.convert, direction).result()
            peaks.append(pool.submit(_own_peak_bytes).result())
    return peaks[1] - peaks[0]


def _own_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def startup_cost() -> tuple[float, float]:
    """(seconds, CPU seconds) of a process that imports the converters and ends; the second of two, whose files are cached."""
    for _ in range(2):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-W", "ignore", "-c", _STARTUP], check=True, cwd=FOLDER.parent)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_conversions(tiny: Folders, whole: Folders, num_bytes: int, repeats: int) -> list[Conversion]:
    """Both directions and their copies, one after the other in every turn."""
    calls = [(direction, call) for direction in DIRECTIONS for call in (whole.copy, whole.convert)]
    turns = []
    for _ in range(repeats):
        turn = []
        for direction, call in calls:
            whole.prepare(direction)
            turn.append(timed(functools.partial(call, direction)))
        turns.append(turn)
    times = list(zip(*turns, strict=True))
    peaks = [peak_beyond_tiny(direction, tiny, whole) for direction in DIRECTIONS]
    return [
        Conversion.of(direction, num_bytes, times[2 * i + 1], times[2 * i], peaks[i]) for i, direction in enumerate(DIRECTIONS)
    ]


def make_models(options: argparse.Namespace, directory: Path) -> tuple[Folders, Folders, int]:
    """(tiny, whole, bytes of its tensors), made in ``directory`` and checked.

    Raises:
        ConversionError: the disk has no room, the sizes make no model, or a round trip is not exact.
    """
    made = []
    for name, sizes in (("tiny", TINY), ("whole", vars(options))):
        root = directory / name
        folders = Folders(root / "hf", root / "megatron", root / "output", options.max_shard_mb * 1e6)
        write_config(folders.hf, sizes)
        plan = plan_weights(folders.hf)
        num_bytes = sum(tensor.num_bytes for tensor in plan)
        # The model, its Megatron form and one output; a tenth of it for headers and the file system.
        needed, free = 3.3 * num_bytes, shutil.disk_usage(directory).free
        if free < needed:
            raise ConversionError(
                f"--directory {options.directory} has {free / 1e6:,.0f} MB free; a model of {num_bytes / 1e6:,.0f} MB, its "
                f"Megatron form and a copy take {needed / 1e6:,.0f}. Name another, or ask for a smaller model (--num-layers)."
            )
        write_random_weights(folders.hf, plan, folders.max_shard_bytes, options.seed)
        folders.check_round_trip()
        made.append(folders)
    return made[0], made[1], num_bytes


def table(results: Sequence[Conversion], startup: tuple[float, float]) -> str:
    """A line per direction, and one of what starting costs."""
    side = f"{'s':>9}{'GB/s':>7}{'CPU s':>7}"
    lines = [f"{'':<16}{'':>8}{'conversion':>23}{'copy':>23}{'speed over copy':>24}{'peak memory':>18}"]
    lines.append(f"{'direction':<16}{'MB':>8}{side}{side}{'p50':>10}{'p20':>7}{'p80':>7}{'MB':>10}{'/ size':>8}")
    for one in results:
        line = f"{one.direction:<16}{one.num_bytes / 1e6:>8.0f}"
        for seconds, cpu_seconds in ((one.seconds, one.cpu_seconds), (one.copy_seconds, one.copy_cpu_seconds)):
            line += f"{seconds.p50:>9.2f}{one.gigabytes_per_second(seconds):>7.2f}{cpu_seconds.p50:>7.2f}"
        speed = one.speed_over_copy
        line += f"{speed.p50:>10.2f}{speed.p20:>7.2f}{speed.p80:>7.2f}{one.peak_bytes / 1e6:>10.1f}{one.memory_over_size:>8.3f}"
        lines.append(line)
    lines.append(f"start and imports of a converter, on top of every conversion: {startup[0]:.2f} s, {startup[1]:.2f} CPU s")
    return "\n".join(lines)


def goals(results: Sequence[Conversion]) -> list[Goal]:
    """For checkpoints of 400 MB and more."""
    held = []
    for one in results:
        if one.num_bytes >= LEAST_GOAL_BYTES:
            title = f"convert, {one.direction}"
            held.append(Goal(f"{title}: speed over that of a copy, median", LEAST_SPEED, one.speed_over_copy.p50, at_least=True))
            held.append(Goal(f"{title}: peak memory over size", MOST_MEMORY, one.memory_over_size))
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_convert", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where to work for the while, on the disk to be measured (default: %(default)s)",
    )
    for name, default, meaning in (
        ("num-layers", 4, "layers of the model"),
        ("hidden-size", 2048, "its hidden size"),
        ("ffn-hidden-size", 5632, "its feed-forward size"),
        ("num-attention-heads", 32, "its heads"),
        ("num-query-groups", 8, "its key and value heads"),
        ("vocab-size", 32000, "its vocabulary"),
        ("max-shard-mb", 200, "size of a safetensors file in MB"),
        ("repeats", 7, "turns"),
        ("seed", 1, "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_convert.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make, check, time, show, append."""
    options = parse_options(argv)
    try:
        with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench_convert_") as directory:
            results = measure_conversions(*make_models(options, Path(directory)), options.repeats)
    except (RmipoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    startup = startup_cost()
    settings = {name: getattr(options, name) for name in (*TINY, "max_shard_mb", "repeats", "seed")}
    costs = {"startup_seconds": startup[0], "startup_cpu_seconds": startup[1]}
    rows = [settings | one.row() | costs for one in results]
    return report(options, "convert", table(results, startup), rows, goals(results))


if __name__ == "__main__":
    sys.exit(main())
