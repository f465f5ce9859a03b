"""Logs of small runs that never were, with numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.reports.pictures.runs import Run, find_runs

KINDS = ["near", "clear", "near", "clear", "clear", "near", "clear"]
# Gaps of seven held-out pairs, before and after: one tie, two losses.
FIRST = [-0.5, 0.25, 0.0, 0.5, -0.25, -1.0, 0.125]
LAST = [0.0, 1.0, 0.5, 1.5, -0.25, -0.5, 0.75]


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    directory: Path,
    *flags: str,
    accuracies: tuple[float, float] = (0.25, 0.75),
    first: list[float] = FIRST,
    last: list[float] = LAST,
) -> Path:
    """The logs of a run of seven held-out pairs and five steps that were told of, 2 seconds a step, then 4."""
    logs = directory / "logs"
    logs.mkdir(parents=True)
    parse_arguments(["--data-path", "absent", *flags]).save_config(logs / "config.yaml")
    config = yaml.safe_load((logs / "config.yaml").read_text())
    evaluations = [
        {
            "kind": "eval",
            "step": step,
            "rewards/accuracies": accuracy,
            "rewards/accuracies/se": 0.0625,
            "loss": 1.0,
            "num_pairs": 7,
        }
        for step, accuracy in zip((0, 10), accuracies, strict=True)
    ]
    steps = [
        {
            **{"kind": "train", "step": 2 * number, "step_seconds": 2.0 if number < 3 else 4.0, "memory_gib": 0.5 + number / 8},
            **{"loss": 2.0 - number / 4, "rewards/margins": number / 2, "pairs_per_second": 10.0 * number},
            # Not there in one record.
            "rewards/accuracies": None if number == 2 else 0.5 + number / 16,
        }
        for number in range(1, 6)
    ]
    write_lines(logs / "metrics.jsonl", [evaluations[0], *steps, evaluations[1]])
    for name, step, gaps in (("held_out_pairs.first.jsonl", 0, first), ("held_out_pairs.jsonl", 10, last)):
        pairs = [{"step": step, "logps/chosen": gap - 1.0, "logps/rejected": -1.0, "rewards/margins": 2.0 * gap} for gap in gaps]
        if config["objective"] == "rmipo":
            pairs = [{**pair, "dpmi": gap, "gamma": 1.6 if gap <= 0 else 0.5} for pair, gap in zip(pairs, gaps, strict=True)]
        write_lines(logs / name, pairs)
    return directory


def write_rows(path: Path, **columns: Sequence[Any]) -> Path:
    """A row for each held-out pair; one less or more where the columns have."""
    write_lines(path, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    return path


def runs_of(*directories: Path) -> list[Run]:
    return find_runs([str(directory) for directory in directories])
