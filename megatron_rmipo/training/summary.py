"""What a finished run did to the held-out pairs, as a table of its first and last evaluation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.training.reporting import METRICS_FILE

Record = Mapping[str, float]

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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Name the log directory of a run (SAVE/logs).") from error
    evaluations = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not a JSON record: {line[:60]!r}.") from error
        if record.get("kind") == "eval":
            evaluations.append(record)
    if len(evaluations) < 2:
        raise ConfigError(
            f"{path}: {len(evaluations)} evaluations in it, two are needed to compare. Train with --valid-data-path or --split."
        )
    return evaluations


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
    """Whether the target margins show what RMiPO's paper claims: ambiguous pairs keep a wide one, clear pairs lose it."""
    if "gamma/p50" not in after or gamma_min >= gamma_max:
        return ""
    middle = (gamma_min + gamma_max) / 2
    median, widest = after["gamma/p50"], after["gamma/p95"]
    if median < middle < widest:
        verdict = "ambiguous pairs keep a wide margin while clear ones have lost theirs, as the paper claims"
    elif median >= middle:
        verdict = "most pairs keep a wide margin: the prompt tells few of them apart, and what the paper claims does not show"
    else:
        verdict = "nearly all pairs have lost theirs: too few ambiguous ones are left to show what the paper claims"
    return (
        f"Target margins, of {gamma_min} to {gamma_max}: at most {median:.2f} for half of the pairs, at least {widest:.2f} for one "
        f"in twenty; {verdict}."
    )


def summarize_run(log_dir: Path) -> str:
    """Table and sentences for the run whose logs lie in ``log_dir``.

    Raises:
        ConfigError: the logs are missing or hold fewer than two evaluations.
    """
    evaluations = read_evaluations(log_dir)
    before, after = evaluations[0], evaluations[-1]
    gamma_min, gamma_max = _margin_bounds(log_dir / "config.yaml")
    sentences = [describe_change(before, after), describe_margins(after, gamma_min, gamma_max)]
    return "\n".join([comparison_table(before, after), "", *(sentence for sentence in sentences if sentence)])


def _margin_bounds(path: Path) -> tuple[float, float]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: the run's configuration cannot be read: {error}") from error
    bounds = config.get("gamma_min"), config.get("gamma_max")
    return (0.0, 0.0) if None in bounds else (float(bounds[0]), float(bounds[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/summarize_run.py``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="summarize_run.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--log-dir", type=Path, required=True, metavar="DIR", help="directory of the run's metrics.jsonl")
    parser.add_argument("--model", type=Path, metavar="DIR", help="where the trained model lies, to be shown")
    arguments = parser.parse_args(argv)
    try:
        print(summarize_run(arguments.log_dir))
    except RmipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.model is not None:
        print(f"The trained model, in Hugging Face form: {arguments.model}")
    return 0
