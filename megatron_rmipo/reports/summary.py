"""What a finished run did to the held-out pairs, as a table of its first and last evaluation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rmipo.command import run_command
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.reporter import METRICS_FILE, PAIRS_FILE

Record = Mapping[str, Any]

# What the table shows, where the objective has it: name in metrics.jsonl -> what a reader calls it.
_ROWS = {
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin, mean",
    "rewards/margins/p50": "reward margin, median",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "gamma": "target margin gamma, mean",
    "gamma/p5": "target margin gamma, 5 %",
    "gamma/p50": "target margin gamma, median",
    "gamma/p95": "target margin gamma, 95 %",
    "dpmi/p50": "dpmi, median",
    "nll/chosen": "negative log-likelihood of chosen",
    "loss": "loss",
}


def read_evaluations(log_dir: Path) -> list[Record]:
    """The evaluations of a run, in order.

    Raises:
        ConfigError: there is no metrics.jsonl, a line of it is damaged, or it has fewer than two evaluations.
    """
    path = log_dir / METRICS_FILE
    evaluations = [record for record in read_records(path) if record.get("kind") == "eval"]
    if len(evaluations) < 2:
        raise ConfigError(
            f"{path}: {len(evaluations)} evaluations in it, two are needed to compare. Train with --valid-data-path or --split."
        )
    return evaluations


def read_records(path: Path) -> list[Record]:
    """The JSON objects of a file, one a line.

    Raises:
        ConfigError: it cannot be read, or a line of it is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name the log directory of a run (SAVE/logs).") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ConfigError(f"{path}:{number}: not a JSON record: {line[:60]!r}.")
        records.append(record)
    return records


def comparison_table(before: Record, after: Record) -> str:
    """Both evaluations side by side, with the difference."""
    lines = [f"{'held-out pairs':<36}{'before':>10}{'after':>10}{'change':>10}"]
    for name, title in _ROWS.items():
        first, last = before.get(name), after.get(name)
        if first is not None and last is not None:
            lines.append(f"{title:<36}{first:>10.3f}{last:>10.3f}{last - first:>+10.3f}")
    return "\n".join(lines)


def describe_change(before: Record, after: Record) -> str:
    """In a sentence, what happened to accuracy and margin; honest about a fall."""
    parts = []
    for name, title in (("rewards/accuracies", "preference accuracy"), ("rewards/margins", "the reward margin")):
        if name in before and name in after:
            change = after[name] - before[name]
            verb = "rose" if change > 0 else "fell" if change < 0 else "did not move"
            parts.append(f"{title} {verb} from {before[name]:.3f} to {after[name]:.3f}")
    return f"Held-out {', '.join(parts)} in {after['step'] - before['step']} steps." if parts else ""


def describe_margins(after: Record, gamma_min: float, gamma_max: float) -> str:
    """How the target margins are spread. What a wide or a narrow one means for a pair only the table by kind can tell."""
    if "gamma/p50" not in after or gamma_min >= gamma_max:
        return ""
    return (
        f"Target margins, of {gamma_min} to {gamma_max}: at most {after['gamma/p50']:.2f} for half of the pairs, at least "
        f"{after['gamma/p95']:.2f} for one in twenty."
    )


def table_by_kind(pairs: Sequence[Record], kinds: Sequence[str]) -> str:
    """Accuracy, reward margin and target margin of the held-out pairs of each kind, hardest kind first."""
    members: dict[str, list[Record]] = {}
    for kind, pair in zip(kinds, pairs, strict=True):
        members.setdefault(kind, []).append(pair)
    columns = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "gamma": "gamma", "dpmi": "dpmi"}
    columns = {name: title for name, title in columns.items() if name in pairs[0]}
    lines = [f"{'kind':<16}{'pairs':>8}" + "".join(f"{title:>10}" for title in columns.values())]
    for kind in sorted(members, key=lambda name: _mean(members[name], "rewards/margins")):
        group = members[kind]
        lines.append(f"{kind:<16}{len(group):>8}" + "".join(f"{_mean(group, name):>10.3f}" for name in columns))
    return "\n".join(lines)


def describe_claim(pairs: Sequence[Record]) -> str:
    """Whether RMiPO's claim shows: pairs the model tells apart less keep a wider target margin than the others.

    The reward margin says how well a pair is told apart, and is not what the target margin is computed from.
    """
    ordered = sorted(pairs, key=lambda pair: pair["rewards/margins"])
    quarter = max(1, len(ordered) // 4)
    narrow, wide = _mean(ordered[-quarter:], "gamma"), _mean(ordered[:quarter], "gamma")
    verdict = "as the paper claims" if wide > narrow + 0.05 else "which does not show what the paper claims"
    return (
        f"Ambiguous pairs (the quarter of least reward margin) have a target margin of {wide:.2f} on average, clear ones (the "
        f"quarter of most) {narrow:.2f}: {verdict}."
    )


def _mean(group: Sequence[Record], name: str) -> float:
    return float(sum(pair[name] for pair in group) / len(group))


def read_pairs(log_dir: Path) -> list[Record]:
    """What the last evaluation said of each held-out pair, in stored order; empty where it was not written."""
    path = log_dir / PAIRS_FILE
    if not path.exists():
        return []
    return read_records(path)


def read_kinds(rows: Path) -> list[str]:
    """The field ``kind`` of every row of a jsonl file.

    Raises:
        ConfigError: the file cannot be read, or a row has no such field.
    """
    try:
        return [json.loads(line)["kind"] for line in rows.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--rows {rows}: not a jsonl file whose rows have the field 'kind' ({error!r}).") from error


def summarize_run(log_dir: Path, rows: Path | None = None) -> str:
    """Tables and sentences for the run whose logs lie in ``log_dir``.

    Args:
        log_dir: of the run.
        rows: the jsonl file the held-out pairs were prepared from; its field ``kind`` groups them.

    Raises:
        ConfigError: the logs are missing or hold fewer than two evaluations, or the rows are not those of the held-out pairs.
    """
    evaluations = read_evaluations(log_dir)
    before, after = evaluations[0], evaluations[-1]
    gamma_min, gamma_max = _margin_bounds(log_dir / "config.yaml")
    sentences = [describe_change(before, after), describe_margins(after, gamma_min, gamma_max)]
    parts = [comparison_table(before, after), "\n".join(sentence for sentence in sentences if sentence)]
    pairs = read_pairs(log_dir)
    if pairs and "gamma" in pairs[0] and gamma_min < gamma_max:
        parts.append(describe_claim(pairs))
        if rows is not None:
            kinds = read_kinds(rows)
            if len(kinds) != len(pairs):
                raise ConfigError(f"--rows {rows}: {len(kinds)} rows, but {len(pairs)} held-out pairs were evaluated.")
            parts.append(table_by_kind(pairs, kinds))
    return "\n\n".join(parts)


def _margin_bounds(path: Path) -> tuple[float, float]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: the run's configuration cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not the configuration of a run.")
    low, high = config.get("gamma_min"), config.get("gamma_max")
    return (0.0, 0.0) if low is None or high is None else (float(low), float(high))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/summarize_run.py``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="summarize_run.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--log-dir", type=Path, required=True, metavar="DIR", help="directory of the run's metrics.jsonl")
    parser.add_argument("--model", type=Path, metavar="DIR", help="where the trained model lies, to be shown")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="jsonl the held-out pairs came from: group them by its field 'kind'"
    )
    arguments = parser.parse_args(argv)

    def show() -> None:
        print(summarize_run(arguments.log_dir, arguments.rows))
        if arguments.model is not None:
            print(f"The trained model, in Hugging Face form: {arguments.model}")

    return run_command(show)
