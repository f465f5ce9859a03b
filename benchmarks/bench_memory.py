"""Estimated memory of a rank against what is allocated, at small size on the CPU, for a layout of each kind.

    python -m benchmarks.bench_memory [--layouts WORD ...] [--check]

Real ranks over gloo. Standing memory (weights, gradients, optimizer) is the bytes of all tensors that an update leaves; a pass's
is the peak of torch's allocations during a gradient pass above that. The estimate is the one that the out-of-memory report and
the planner use. Of each layout there is a line for each pipeline stage, of its rank that the estimate is farthest from.
See README.md beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory_layouts import LAYOUTS, Counted, MemoryLayout, count_layouts, estimated
from benchmarks.ranks import run_ranks
from benchmarks.report import FOLDER, Goal, add_report_options, report

MOST_ERROR = 0.15


def rows_of(layout: MemoryLayout, ranks: Sequence[Counted]) -> list[dict[str, Any]]:
    """A row for each stage of a layout."""
    rows: dict[int, dict[str, Any]] = {}
    for counted in ranks:
        row = make_row(layout, counted)
        if counted.stage not in rows or row["error"] > rows[counted.stage]["error"]:
            rows[counted.stage] = row
    return [rows[stage] for stage in sorted(rows)]


def make_row(layout: MemoryLayout, counted: Counted) -> dict[str, Any]:
    """What was counted on a rank, what was estimated, and the larger error of both parts."""
    estimate = estimated(layout, counted)
    standing, peak = estimate.standing.total / counted.standing, estimate.pack.peak / counted.peak
    return {
        "layout": layout.name,
        "ranks": layout.ranks,
        "stage": counted.stage,
        "pack_tokens": counted.pack.num_tokens,
        "packs": counted.num_packs,
        "standing_bytes": counted.standing,
        "peak_bytes": counted.peak,
        "standing_ratio": standing,
        "peak_ratio": peak,
        "total_ratio": estimate.peak / (counted.standing + counted.peak),
        "error": max(abs(standing - 1), abs(peak - 1)),
    }


def measure(layouts: Sequence[MemoryLayout]) -> list[dict[str, Any]]:
    """Rows of all layouts; those of as many ranks share their processes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for size in sorted({layout.ranks for layout in layouts}):
        some = [layout for layout in layouts if layout.ranks == size]
        by_rank = run_ranks(count_layouts, size, some)
        found.update({layout.name: rows_of(layout, ranks) for layout, *ranks in zip(some, *by_rank, strict=True)})
    return [row for layout in layouts for row in found[layout.name]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per layout and stage; estimated over counted."""
    lines = [f"{'layout':<54}{'stage':>6}{'standing MB':>13}{'ratio':>7}{'pass MB':>9}{'ratio':>7}{'both':>7}"]
    for row in rows:
        sizes = [(row[f"{name}_bytes"] / 1e6, row[f"{name}_ratio"]) for name in ("standing", "peak")]
        lines.append(
            f"{row['layout']:<54}{row['stage']:>6}{sizes[0][0]:>13.2f}{sizes[0][1]:>7.3f}{sizes[1][0]:>9.2f}{sizes[1][1]:>7.3f}"
            f"{row['total_ratio']:>7.3f}"
        )
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """For each layout its worst stage."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["layout"]] = max(row["error"], worst.get(row["layout"], 0.0))
    return [Goal(f"estimated memory, {name}: error", MOST_ERROR, error) for name, error in worst.items()]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_memory", allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--layouts", nargs="+", metavar="WORD", help="those whose name has one of these in it (default: all)")
    add_report_options(parser, FOLDER / "results_memory.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, estimate, show, append."""
    options = parse_options(argv)
    chosen = [layout for layout in LAYOUTS if not options.layouts or any(word in layout.name for word in options.layouts)]
    rows = measure(chosen)
    return report(options, "memory", table(rows), rows, goals(rows))


if __name__ == "__main__":
    sys.exit(main())
