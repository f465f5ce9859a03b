"""What a finished run did to the held-out pairs, as a table of its first and last evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.held_out import (
    FEWEST_PAIRS,
    NUM_PAIRS,
    Figure,
    Record,
    difference,
    mean_change,
    mean_of,
    plus_minus,
    recorded,
)
from megatron_rmipo.reports.reporter import FIRST_PAIRS_FILE, METRICS_FILE, PAIRS_FILE, evaluations_by_set, pairs_file

# What the table shows, where the objective has it: name in metrics.jsonl -> what a reader calls it.
METRIC_TITLES = {
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin, mean",
    "rewards/margins/p50": "reward margin, median",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "gamma": "target margin gamma, mean",
    "gamma/p5": "target margin gamma, 5 %",
    "gamma/p50": "target margin gamma, median",
    "gamma/p95": "target margin gamma, 95 %",
    "gamma/at_min": "share within 0.01 of gamma_min",
    "gamma/at_max": "share within 0.01 of gamma_max",
    "dpmi/p50": "difference in PMI (dpmi), median",
    "nll/chosen": "negative log-likelihood of chosen",
    "loss": "loss",
}
# A difference of target margins that is worth a claim, however small its error.
_NOTICEABLE_MARGIN = 0.05


def read_evaluations(log_dir: Path) -> list[Record]:
    """The evaluations of a run's main held-out set, in order.

    Raises:
        ConfigError: as :func:`read_held_out_sets`, or it has none.
    """
    sets = read_held_out_sets(log_dir)
    if "" not in sets:
        raise ConfigError(
            f"{log_dir / METRICS_FILE}: no evaluations of a main held-out set in it, of {', '.join(sets)} alone. Train with "
            "--valid-data-path or --split."
        )
    return sets[""]


def read_held_out_sets(log_dir: Path) -> dict[str, list[Record]]:
    """The evaluations of each held-out set that has two or more, in order, by its name; "" is the main one.

    Raises:
        ConfigError: there is no metrics.jsonl, a line of it is damaged, or no set has two evaluations.
    """
    path = log_dir / METRICS_FILE
    sets = evaluations_by_set(read_records(path))
    compared = {name: evaluations for name, evaluations in sets.items() if len(evaluations) > 1}
    if not compared:
        most = max(map(len, sets.values()), default=0)
        raise ConfigError(
            f"{path}: {most} evaluations in it, two are needed to compare. Train with --valid-data-path or --split."
        )
    return compared


def read_records(path: Path) -> Iterator[Record]:
    """The JSON objects of a file, one a line, one after the other: a long run's steps need not be in memory together.

    Raises:
        ConfigError: it cannot be read, or a line of it is damaged.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield _record(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name the log directory of a run (SAVE/logs).") from error


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: not a JSON record: {line.rstrip()[:60]!r}.")
    return record


def paired_changes(first: Sequence[Record], last: Sequence[Record]) -> dict[str, Figure]:
    """Metric -> its mean change between two evaluations of the same pairs; empty where the pairs of one are not there."""
    if not first or not last:
        return {}
    changes = {name: mean_change(first, last, name) for name in last[0]}
    return {name: change for name, change in changes.items() if change is not None}


def comparison_table(before: Record, after: Record, changes: Mapping[str, Figure]) -> str:
    """Both evaluations side by side, with the difference; each mean with its standard error, where that is known.

    Args:
        before, after: the evaluations.
        changes: metric -> its change pair by pair.
    """
    numbers = [evaluation.get(NUM_PAIRS) for evaluation in (before, after)]
    lines = [f"{f'held-out pairs ({_stands_on(*numbers)})':<36}{'before':>8}{'after':>18}{'change':>18}"]
    for name, title in METRIC_TITLES.items():
        figures = [recorded(before, name), recorded(after, name)]
        if figures[0] is not None and figures[1] is not None:
            error = changes[name].error if name in changes else None
            own = [figure.num_pairs for figure in figures if figure is not None]
            title += f" ({_stands_on(*own)})" if own != numbers else ""
            cells = [figure.text(">8.3f") for figure in figures if figure is not None]
            change = figures[1].value - figures[0].value
            lines.append(f"{title:<36}{cells[0]:<18}{cells[1]:<18}{change:>+8.3f}{plus_minus(error)}".rstrip())
    return "\n".join(lines)


def _stands_on(before: int | None, after: int | None) -> str:
    numbers = ["unknown" if number is None else str(number) for number in dict.fromkeys((before, after))]
    return f"n = {', then '.join(numbers)}"


def describe_change(before: Record, after: Record, changes: Mapping[str, Figure]) -> str:
    """In a sentence, what happened to accuracy and margin; honest about a fall, about chance and about too few pairs."""
    parts, known = [], []
    for name, title in (("rewards/accuracies", "preference accuracy"), ("rewards/margins", "the reward margin")):
        first, last = recorded(before, name), recorded(after, name)
        if first is not None and last is not None:
            known.append(changes.get(name, Figure(last.value - first.value, last.num_pairs, None)))
            verb = _verb(known[-1]) if name in changes else "went"
            parts.append(f"{title} {verb} from {first.value:.3f} to {last.value:.3f}")
    if not parts:
        return ""
    text = f"Held-out {', '.join(parts)} in {after['step'] - before['step']} steps"
    number = known[0].num_pairs
    if number is not None and not known[0].has_enough_pairs:
        return f"{text}: {_too_few(number)}."
    if not changes:
        return f"{text}; without {FIRST_PAIRS_FILE} nothing says how far that is beyond chance."
    ties = f" {_ALL_TIES}" if _begins_with_ties(before) else ""
    return f"{text} (n = {number}; a change counts beyond two standard errors).{ties}"


# As with DPO.
_ALL_TIES = "At first all margins were 0, the model being its own reference, and a tie does not count as right."


def _begins_with_ties(before: Record) -> bool:
    figures = [recorded(before, name) for name in ("rewards/accuracies", "rewards/margins")]
    return all(figure is not None and figure.value == 0.0 for figure in figures)


def _verb(change: Figure) -> str:
    if not change.has_enough_pairs:
        return "went"
    if not change.is_beyond_its_error:
        return "did not move beyond its error,"
    return "rose" if change.value > 0 else "fell"


def _too_few(num_pairs: int) -> str:
    return f"not enough pairs to tell (n = {num_pairs}, {FEWEST_PAIRS} or more would do)"


def describe_margins(after: Record, gamma_min: float, gamma_max: float) -> str:
    """How the target margins are spread. What a wide or a narrow one means for a pair only the table by kind can tell."""
    if "gamma/p50" not in after or gamma_min >= gamma_max:
        return ""
    number = recorded(after, "gamma/p50")
    stands_on = f" (n = {number.num_pairs})" if number is not None and number.num_pairs is not None else ""
    return (
        f"Target margins{stands_on}, of {gamma_min} to {gamma_max}: at most {after['gamma/p50']:.2f} for half of the pairs, at "
        f"least {after['gamma/p95']:.2f} for one in twenty."
    )


def table_by_kind(pairs: Sequence[Record], kinds: Sequence[str]) -> str:
    """Accuracy, reward margin and target margin of the held-out pairs of each kind, hardest kind first."""
    members: dict[str, list[Record]] = {}
    for kind, pair in zip(kinds, pairs, strict=True):
        members.setdefault(kind, []).append(pair)
    columns = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "gamma": "gamma", "dpmi": "dpmi"}
    columns = {name: title for name, title in columns.items() if name in pairs[0]}
    lines = [f"{'kind':<16}{'n':>8}" + "".join(f"{title:>10}{'':8}" for title in columns.values()).rstrip()]
    means = {kind: {name: mean_of(group, name) for name in columns} for kind, group in members.items()}
    margins = {kind: of_kind["rewards/margins"] for kind, of_kind in means.items()}
    for kind in sorted(members, key=lambda kind: margin.value if (margin := margins[kind]) is not None else math.inf):
        cells = [f"{'' if mean is None else mean.text('>10.3f'):<18}" for mean in means[kind].values()]
        lines.append(f"{kind:<16}{len(members[kind]):>8}" + "".join(cells).rstrip())
    return "\n".join(lines)


def describe_claim(pairs: Sequence[Record]) -> str:
    """Whether RMiPO's claim shows: pairs the model tells apart less keep a wider target margin than the others.

    The reward margin says how well a pair is told apart, and is not what the target margin is computed from.
    """
    complete = [pair for pair in pairs if pair["gamma"] is not None and pair["rewards/margins"] is not None]
    ordered = sorted(complete, key=lambda pair: pair["rewards/margins"])
    quarter = max(1, len(ordered) // 4)
    narrow, wide = mean_of(ordered[-quarter:], "gamma"), mean_of(ordered[:quarter], "gamma")
    if narrow is None or wide is None:
        return ""
    gap = difference(wide, narrow)
    if len(ordered) < FEWEST_PAIRS:
        verdict = _too_few(len(ordered))
    elif gap.is_beyond_its_error and gap.value > _NOTICEABLE_MARGIN:
        verdict = "as the paper claims"
    else:
        verdict = "which does not show what the paper claims"
    return (
        f"Ambiguous pairs (the quarter of least reward margin) have a target margin of {wide.text('.2f')} on average, clear ones "
        f"(the quarter of most) {narrow.text('.2f')}, n = {quarter} each: {verdict}."
    )


def read_pairs(log_dir: Path, evaluation: Record, name: str = PAIRS_FILE) -> list[Record]:
    """What an evaluation said of each held-out pair, in stored order.

    Args:
        log_dir: of the run.
        evaluation: its record.
        name: of the file: of the last evaluation, or of the first.

    Returns:
        Empty where it was not written, or is of another evaluation, as after a resume from before it.
    """
    path = log_dir / name
    pairs = list(read_records(path)) if path.exists() else []
    # Runs of an earlier version did not write the step.
    return pairs if pairs and pairs[0].get("step", evaluation["step"]) == evaluation["step"] else []


def read_rows(rows: Path) -> list[Record]:
    """The rows of a jsonl file.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no object.
    """
    try:
        with rows.open(encoding="utf-8") as lines:
            return [_record(line, f"--rows {rows}:{number}") for number, line in enumerate(lines, start=1)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rows {rows}: cannot be read: {error}. Name the jsonl file the held-out pairs came from.") from error


def read_kinds(rows: Path, field: str = "kind") -> list[str]:
    """A field of every row of a jsonl file, as text.

    Raises:
        ConfigError: the file cannot be read, or a row has no such field.
    """
    found = read_rows(rows)
    for number, row in enumerate(found, start=1):
        if field not in row:
            raise ConfigError(f"--rows {rows}:{number}: the row has no field {field!r}; it has {', '.join(map(repr, row))}.")
    return [str(row[field]) for row in found]


def check_rows_are_of(rows: Path, num_rows: int, num_pairs: int) -> None:
    """Refuse rows that are not those of the held-out pairs.

    Raises:
        ConfigError: there are more or fewer.
    """
    if num_rows != num_pairs:
        raise ConfigError(
            f"--rows {rows}: {num_rows} rows, but {num_pairs} held-out pairs were evaluated. Name the file these alone came from."
        )


def summarize_run(log_dir: Path, rows: Path | None = None) -> str:
    """Tables and sentences for the run whose logs lie in ``log_dir``.

    Args:
        log_dir: of the run.
        rows: the jsonl file the held-out pairs were prepared from; its field ``kind`` groups them.

    Raises:
        ConfigError: the logs are missing or hold fewer than two evaluations, or the rows are not those of the held-out pairs.
    """
    sets = read_held_out_sets(log_dir)
    further = [_table_of_set(log_dir, name, evaluations) for name, evaluations in sets.items() if name]
    if "" not in sets:
        return "\n\n".join(further)
    before, after = sets[""][0], sets[""][-1]
    gamma_min, gamma_max = margin_bounds(read_configuration(log_dir))
    pairs = read_pairs(log_dir, after)
    changes = paired_changes(read_pairs(log_dir, before, FIRST_PAIRS_FILE), pairs)
    sentences = [describe_change(before, after, changes), describe_margins(after, gamma_min, gamma_max)]
    parts = [comparison_table(before, after, changes), "\n".join(sentence for sentence in sentences if sentence)]
    if pairs and "gamma" in pairs[0] and gamma_min < gamma_max:
        parts.append(describe_claim(pairs))
        if rows is not None:
            kinds = read_kinds(rows)
            check_rows_are_of(rows, len(kinds), len(pairs))
            parts.append(table_by_kind(pairs, kinds))
    return "\n\n".join(filter(None, [*parts, *further]))


def _table_of_set(log_dir: Path, name: str, evaluations: Sequence[Record]) -> str:
    """The table of a further held-out set, under its name."""
    before, after = evaluations[0], evaluations[-1]
    first = read_pairs(log_dir, before, pairs_file(name, first=True))
    changes = paired_changes(first, read_pairs(log_dir, after, pairs_file(name)))
    told = [f"== {name}", comparison_table(before, after, changes), describe_change(before, after, changes)]
    return "\n".join(filter(None, told))


def read_configuration(log_dir: Path) -> dict[str, Any]:
    """The configuration of a run, flat.

    Raises:
        ConfigError: it cannot be read.
    """
    path = log_dir / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: the run's configuration cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not the configuration of a run.")
    return config


def margin_bounds(config: Mapping[str, Any]) -> tuple[float, float]:
    """Least and most target margin of a run, zeros where it has none."""
    low, high = config.get("gamma_min"), config.get("gamma_max")
    return (0.0, 0.0) if low is None or high is None else (float(low), float(high))
