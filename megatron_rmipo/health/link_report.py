"""Which of the links that were measured are slow, whose fault that is, and the table that says so."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.health.links import KINDS, NEIGHBOURS, Measured, measure_links
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups

LINKS_FILE = "links.json"
# Beyond what a busy host does to its neighbours' figures.
SLOW_FACTOR, SLOW_BY_SECONDS = 3.0, 1e-3
_SHOWN_SLOW, _SHOWN_RANKS = 8, 6
_MEANINGS = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "pp": "pipeline stages",
    "dp": "data parallel",
    "world": "all ranks",
}


def check_links(groups: ProcessGroups, log_dir: Path, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Measure the links, show them as a table, write them to ``links.json`` in the log directory. All ranks call it together.

    What is slow is named and ends nothing: a run may well be worth its time with it.

    Args:
        groups: the process groups of this rank.
        log_dir: made where it is missing, by the first rank.
        say: shows a line, called on the first rank alone.
        warn: the same for what is slow.

    Raises:
        ConfigError: on every rank: the log directory cannot be written.
    """
    measured = measure_links(groups)

    def tell() -> None:
        slow = slow_links(measured)
        for line in link_table(measured):
            say(line)
        for line in describe_slow(measured, slow):
            warn(line)
        _write(log_dir / LINKS_FILE, measured)

    on_first_rank(groups.world, tell)


def _write(path: Path, measured: Sequence[Measured]) -> None:
    entries = [{**dataclasses.asdict(one), "bytes_per_second": round(one.bytes_per_second)} for one in measured]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}. Name another --log-dir.") from error


def link_table(measured: Sequence[Measured]) -> list[str]:
    """A line for each kind of group and of link: how many, the median and the slowest of them."""
    if not measured:
        return ["links: one rank, nothing to measure"]
    lines = [
        f"{'links':<18}{'what':<12}{'where':<15}{'number':>7}{'ranks':>7}{'MB':>7}{'median ms':>11}{'GB/s':>8}{'worst ms':>10}"
    ]
    usual = usual_seconds(measured)
    order = {kind: place for place, kind in enumerate(KINDS)}
    for sort in sorted(usual, key=lambda sort: (order[sort[0]], *sort[1:])):
        found = [one for one in measured if _sort(one) == sort]
        worst, kind, what = max(found, key=lambda one: one.seconds), *sort[:2]
        typical = min(found, key=lambda one: abs(one.seconds - usual[sort]))
        lines.append(
            f"{_MEANINGS[kind]:<18}{what:<12}{'between hosts' if sort[2] else 'within a host':<15}{len(found):>7}"
            f"{len(worst.ranks):>7}{worst.num_bytes / 1e6:>7.1f}{usual[sort] * 1e3:>11.2f}"
            f"{typical.bytes_per_second / 1e9:>8.2f}{worst.seconds * 1e3:>10.2f}"
        )
    return lines


def describe_slow(measured: Sequence[Measured], slow: Sequence[SlowLink]) -> list[str]:
    """What is slow, in lines: ranks first, then the groups and links that show it."""
    hosts = {rank: host for one in measured for rank, host in zip(one.ranks, one.hosts, strict=True)}
    lines = [f"rank {rank} on {hosts[rank]} is slow: both of its links in a group are" for rank in slow_ranks(measured, slow)]
    for one in slow[:_SHOWN_SLOW]:
        found = one.measured
        ranks = ", ".join(map(str, found.ranks[:_SHOWN_RANKS])) + (", ..." if len(found.ranks) > _SHOWN_RANKS else "")
        where = ", ".join(dict.fromkeys(found.hosts[:_SHOWN_RANKS]))
        lines.append(
            f"{_MEANINGS[found.kind]}: {found.what} of ranks {ranks} ({where}) took {found.seconds * 1e3:.2f} ms, "
            f"{one.times_median:.1f} times the median of its kind"
        )
    if len(slow) > _SHOWN_SLOW:
        lines.append(f"{len(slow) - _SHOWN_SLOW} more are slow; all figures are in {LINKS_FILE}")
    return lines


@dataclasses.dataclass(frozen=True)
class SlowLink:
    """Something that took much longer than the median of its kind.

    Attributes:
        measured: what was slow.
        times_median: how many times the median.
    """

    measured: Measured
    times_median: float


def usual_seconds(measured: Sequence[Measured]) -> dict[tuple[str, str, bool], float]:
    """The median by (kind, what, whether it crosses hosts): a network is no slow link of those within a host.

    Of groups that of all groups; of links that of the best link of each rank, since one slow rank makes two links slow.
    """
    best: dict[tuple[str, str, bool], dict[object, float]] = {}
    for one in measured:
        of_sort = best.setdefault(_sort(one), {})
        for member in one.ranks if one.what == NEIGHBOURS else [one.ranks]:
            of_sort[member] = min(of_sort.get(member, one.seconds), one.seconds)
    # The lower one of two: of two groups the slow one is not its own measure.
    return {sort: statistics.median_low(seconds.values()) for sort, seconds in best.items()}


def _sort(measured: Measured) -> tuple[str, str, bool]:
    return measured.kind, measured.what, measured.crosses_hosts


def slow_links(measured: Sequence[Measured]) -> list[SlowLink]:
    """What took ``SLOW_FACTOR`` times, and ``SLOW_BY_SECONDS`` longer than, the median of its kind; worst first."""
    medians = usual_seconds(measured)
    found = []
    for one in measured:
        usual = medians[_sort(one)]
        if one.seconds > max(SLOW_FACTOR * usual, usual + SLOW_BY_SECONDS):
            found.append(SlowLink(one, one.seconds / usual))
    return sorted(found, key=lambda slow: -slow.times_median)


def slow_ranks(measured: Sequence[Measured], slow: Sequence[SlowLink]) -> list[int]:
    """Ranks both of whose links in a group are slow.

    A link between two ranks that have no other tells nothing of which it is.
    """
    slow_pairs = {(one.measured.kind, one.measured.ranks) for one in slow if one.measured.what == NEIGHBOURS}
    links: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for one in measured:
        if one.what == NEIGHBOURS:
            for rank in one.ranks:
                links.setdefault((one.kind, rank), []).append((one.kind, one.ranks))
    return sorted({rank for (_, rank), own in links.items() if len(own) > 1 and all(link in slow_pairs for link in own)})
