"""A run of a thousand ranks of Llama-3-70B, walked through in one process: what a rank pays besides the arithmetic.

    python -m benchmarks.bench_scale [--parts ranks pairs] [--pairs 1000000 60000000] [--check]

Start-up, data order, cutting, checkpoint metadata and metrics, each at several layouts or numbers of pairs, to show growth.
Process groups are pretended, tensors have no storage, tokens are zeros of recorded lengths. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import LLAMA_3_8B, cut_lengths, read_lengths
from benchmarks.large_data import make_large_data
from benchmarks.report import FOLDER, Goal, add_report_options, report
from benchmarks.scale_pairs import measure_pairs
from benchmarks.scale_stages import measure_ranks
from benchmarks.scale_world import Layout, Measured
from megatron_rmipo.data.batches.order_names import NEW_ORDER

PARTS = ("ranks", "pairs")
LAYOUTS = ("8x1x1", "8x4x2", "8x4x32", "8x1x128")
PAIRS = (1_000_000, 60_000_000)
GOAL_SETTINGS = {"layouts": list(LAYOUTS), "pairs": list(PAIRS), "batch_size": 1024}
# Of the figures of a rank: in a world 16 times as large they are 16 times as large where each rank has to be heard of, or each
# file of the checkpoint, of which a rank writes two; Megatron makes every group on every rank. All other stages must stay as they
# are.
LINEAR = {
    "flags and environment compared: the first rank",
    "model and data compared: the first rank",
    "the checkpoint looked for",
    "the checkpoint decided and checked: the first rank",
    "its record read: one rank of a host",
    "its record written: the first rank",
    "process groups made",
    "plans of the first two saves told: the first rank",
    "what a save wrote told: the first rank",
}
ALLOWANCE = 1.15
SMALLER, LARGER = "8x4x2", "8x4x32"
STARTING = ("flags and environment compared", "the checkpoint looked for", "model and data compared", "process groups made")
MOST_START_SECONDS, MOST_DATA_SECONDS, MOST_DATA_BYTES, MOST_BATCH_SECONDS = 1.0, 5.0, 100e6, 0.1
# What a rank does with all pairs before the first step, and for each batch.
OPENING = ("data opened, a hundredth held out", "data identified: one rank of a host", "the largest pair found")
BATCH = ("order of a batch", "a batch read, cut and laid out")
Results = Mapping[str, Mapping[str, Measured]]


def rank_rows(results: Results) -> list[dict[str, Any]]:
    """A line per stage, with every figure of each layout."""
    stages = list(dict.fromkeys(stage for one in results.values() for stage in one))
    return [
        {"part": "ranks", "stage": stage, "growth": "ranks" if stage in LINEAR else "none"}
        | {
            f"{figure}_{layout}": value
            for layout, one in results.items()
            for figure, value in dataclasses.asdict(one[stage]).items()
        }
        for stage in stages
    ]


def pair_rows(results: Results) -> list[dict[str, Any]]:
    """A line per stage, with every figure of the smallest and the largest number of pairs."""
    least, most = min(results, key=int), max(results, key=int)
    sizes = {"order": NEW_ORDER, "pairs_small": int(least), "pairs_large": int(most)}
    return [
        {"part": "pairs", "stage": stage}
        | sizes
        | {
            f"{figure}_{size}": value
            for size, one in (("small", results[least]), ("large", results[most]))
            for figure, value in dataclasses.asdict(one[stage]).items()
        }
        for stage in results[least]
    ]


def table(by_layout: Results, by_pairs: Results) -> str:
    """A line per stage and layout, and per stage and number of pairs."""
    lines = []
    for title, results in (("layout", by_layout), ("pairs", by_pairs)):
        if results:
            lines.append(f"{'stage':<60}{title:>10}{'CPU ms':>11}{'peak MB':>10}{'KB moved':>11}{'files':>9}{'number':>8}")
        for stage in dict.fromkeys(stage for one in results.values() for stage in one):
            lines += [f"{stage:<60}{at:>10}{_cells(one[stage])}" for at, one in results.items()]
    return "\n".join(lines)


def _cells(one: Measured) -> str:
    peak, moved, files, number = (
        "" if value is None else format(value * scale, form)
        for value, scale, form in (
            (one.peak_bytes, 1e-6, ".2f"),
            (one.moved_bytes, 1e-3, ".2f"),
            (one.files, 1, ".0f"),
            (one.number, 1, "d"),
        )
    )
    return f"{1e3 * one.cpu_seconds:>11.2f}{peak:>10}{moved:>11}{files:>9}{number:>8}"


def goals(options: argparse.Namespace, by_layout: Results, by_pairs: Results) -> list[Goal]:
    """Nothing of a rank grows faster with the ranks than it must; start-up and batches at 60 million pairs."""
    if not GOAL_SETTINGS.items() <= vars(options).items():
        return []
    held = []
    if by_layout:
        held += _growth(by_layout[SMALLER], by_layout[LARGER])
        start = sum(by_layout[LARGER][stage].cpu_seconds for stage in STARTING)
        held.append(Goal("scale, start-up of a rank of 1,024: CPU s", MOST_START_SECONDS, start))
    if by_pairs:
        large = by_pairs[str(PAIRS[1])]
        opening, batch = [large[stage] for stage in OPENING], [large[stage] for stage in BATCH]
        title = "scale, 60 million pairs"
        held += [
            Goal(f"{title}, start-up: CPU s", MOST_DATA_SECONDS, sum(one.cpu_seconds for one in opening)),
            Goal(f"{title}, start-up: peak bytes", MOST_DATA_BYTES, max(one.peak_bytes or 0 for one in opening)),
            Goal(f"{title}, a batch of 1,024: CPU s", MOST_BATCH_SECONDS, sum(one.cpu_seconds for one in batch)),
            Goal(f"{title}, a batch of 1,024: peak bytes", MOST_DATA_BYTES, max(one.peak_bytes or 0 for one in batch)),
        ]
    return held


def _growth(small: Mapping[str, Measured], large: Mapping[str, Measured]) -> list[Goal]:
    held, more = [], Layout.of(LARGER).ranks / Layout.of(SMALLER).ranks
    for stage, one in large.items():
        for what, before, now in (
            ("bytes moved", small[stage].moved_bytes, one.moved_bytes),
            ("looks at files", small[stage].files, one.files),
        ):
            if before and now:
                limit = ALLOWANCE * (more if stage in LINEAR else 1.0)
                held.append(Goal(f"scale, {stage}: {what}, 1,024 ranks over 64", limit, now / before))
    return held


def measure_layouts(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Measured]]:
    """Every stage that ranks may make costlier, at each layout."""
    prefix = make_large_data(folder, 4 * options.batch_size, _lengths(options))
    results = {}
    for name in options.layouts:
        (folder / name).mkdir()
        results[name] = measure_ranks(Layout.of(name), folder / name, options.batch_size, prefix)
    return results


def measure_sizes(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Measured]]:
    """Every stage that pairs may make costlier, at each number of them."""
    results = {}
    for num_pairs in options.pairs:
        prefix = make_large_data(folder, num_pairs, _lengths(options))
        results[str(num_pairs)] = measure_pairs(prefix, LLAMA_3_8B, options.batch_size)
        for path in folder.glob(f"{Path(prefix).name}.*"):
            path.unlink()
    return results


def _lengths(options: argparse.Namespace) -> Any:
    return cut_lengths(read_lengths(options.lengths), 2048)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_scale", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: both)")
    parser.add_argument("--layouts", nargs="+", metavar="TPxPPxDP", default=list(LAYOUTS), help="of ranks (default: %(default)s)")
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS), help="numbers of pairs (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1024, help="pairs of a global batch (default: %(default)s)")
    parser.add_argument("--lengths", default="ultrafeedback", help="recorded lengths to draw from (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="for 2.7 GB of data, a while (default: that for temporary files)")
    add_report_options(parser, FOLDER / "results_scale.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Walk, show, append."""
    options = parse_options(argv)
    by_layout: dict[str, dict[str, Measured]] = {}
    by_pairs: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        if "ranks" in options.parts:
            by_layout = measure_layouts(options, Path(name))
        if "pairs" in options.parts:
            by_pairs = measure_sizes(options, Path(name))
    settings = {"batch_size": options.batch_size, "lengths": options.lengths}
    rows = [settings | row for row in (*rank_rows(by_layout), *(pair_rows(by_pairs) if by_pairs else []))]
    return report(options, "scale", table(by_layout, by_pairs), rows, goals(options, by_layout, by_pairs))


if __name__ == "__main__":
    sys.exit(main())
