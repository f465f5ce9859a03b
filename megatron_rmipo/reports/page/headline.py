"""What a run did, in the numbers and sentences that are read first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_rmipo.evaluation_file import Cell
from megatron_rmipo.reports.held_out import mean_change, plus_minus, recorded
from megatron_rmipo.reports.page.numbers import MISSING, duration, figure_text, short_number
from megatron_rmipo.reports.page.run_files import PageRun
from megatron_rmipo.reports.page.tables import Table
from megatron_rmipo.reports.summary import describe_change, describe_margins, margin_bounds, paired_changes


def cards(run: PageRun) -> list[tuple[str, str, str]]:
    """The numbers that are read first: (what, value, what it stands beside)."""
    found = []
    own = run.main_held_out
    if own is not None:
        before, after = own.records[0], own.records[-1]
        for name, title in (("rewards/accuracies", "held-out accuracy"), ("rewards/margins", "reward margin")):
            first, last = recorded(before, name), recorded(after, name)
            if last is not None:
                beside = f"{figure_text(first)} before" if before is not after else f"n = {last.num_pairs}"
                found.append((title, figure_text(last), beside))
        for kind in ("chosen", "rejected"):
            change = _change(run, f"logps/{kind}")
            if change is not None:
                found.append((f"log p of {kind}", change, "nats per token, change"))
    pairs = run.last_step.get("consumed_pairs")
    of_all = f" of {run.train_iters:,}" if run.train_iters else ""
    found.append(("steps", f"{run.step:,}{of_all}", f"{pairs:,} pairs" if pairs else ""))
    times = run.columns.get("time")
    if times is not None and len(times.values) > 1:
        found.append(("time", duration(max(times.values) - min(times.values)), "first to last record"))
    speed, memory = run.columns.get("pairs_per_second"), run.columns.get("memory_gib")
    if speed is not None and memory is not None:
        found.append(("pairs per second", short_number(statistics.median(speed.values)), f"{max(memory.values):.3g} GiB at most"))
    return found


def _change(run: PageRun, name: str) -> str | None:
    own = run.main_held_out
    if own is None or len(own.records) < 2:
        return None
    first, last = recorded(own.records[0], name), recorded(own.records[-1], name)
    if first is None or last is None:
        return None
    paired = mean_change(own.first, own.last, name)
    error = plus_minus(paired.error if paired else None).replace("+-", "\u00b1")
    return f"{last.value - first.value:+.3f}{error}"


def verdict(run: PageRun) -> str:
    """In sentences, what happened to accuracy and margins; empty without two evaluations."""
    own = run.main_held_out
    if own is None or len(own.records) < 2:
        return ""
    before, after = own.records[0], own.records[-1]
    sentences = [
        describe_change(before, after, paired_changes(own.first, own.last)),
        describe_margins(after, *margin_bounds(run.config)),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def overview(runs: Sequence[PageRun]) -> Table:
    """Several runs in a line each."""
    named = [{title: value for title, value, _ in cards(run)} for run in runs]
    columns = list(dict.fromkeys(title for one in named for title in one))
    rows: list[list[Cell]] = [
        [run.name, str(run.config.get("objective")), *(one.get(title, MISSING) for title in columns)]
        for run, one in zip(runs, named, strict=True)
    ]
    return Table("", ["run", "objective", *columns], rows, "At the last evaluation of each run.")
