"""Log directories of runs that never were."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.arguments import parse_arguments

NUM_PAIRS = 60
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def train_record(step: int, **changes: Any) -> dict[str, Any]:
    """A step of rmipo."""
    return {
        "kind": "train",
        "time": 1000.0 + step,
        "step": step,
        "consumed_pairs": 32 * step,
        "lr": 1e-6 / step,
        "grad_norm": 1.0 + math.sin(step),
        "skipped_steps": 0,
        "loss": 1.0 / step,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.1 * step,
        "logps/chosen": -0.5,
        "logps/rejected": -1.0,
        "pairs_per_second": 30.0,
        "memory_gib": 0.5,
        **{f"seconds/{phase}": 0.1 for phase in ("data", "before", "gradient", "optimizer", "other")},
        **changes,
    }


def pair_values(accuracy: float, chosen: float = -0.5, **changes: Any) -> list[dict[str, Any]]:
    """Of each held-out pair what an evaluation says."""
    values = []
    for number in range(NUM_PAIRS):
        right = number < round(accuracy * NUM_PAIRS)
        values.append(
            {
                "loss": 0.5 + 0.001 * number,
                "rewards/margins": (1.0 if right else -1.0) + 0.01 * number,
                "rewards/accuracies": float(right),
                "logps/chosen": chosen - 0.001 * number,
                "logps/rejected": -1.0,
                "gamma": 0.3 + 0.02 * number,
                **changes,
            }
        )
    return values


def eval_record(step: int, pairs: list[dict[str, Any]], kind: str = "eval", **changes: Any) -> dict[str, Any]:
    """What an evaluation writes of pairs with these values, errors of the accuracy among it."""
    means = {name: float(np.mean([pair[name] for pair in pairs])) for name in pairs[0]}
    errors = {f"{name}/se": float(np.std([pair[name] for pair in pairs]) / len(pairs) ** 0.5) for name in pairs[0]}
    return {"kind": kind, "time": 1000.0 + step, "step": step, "num_pairs": len(pairs), **means, **errors, **changes}


def write_page_run(
    directory: Path,
    *,
    steps: int = 30,
    flags: Iterable[str] = (),
    before: list[dict[str, Any]] | None = None,
    after: list[dict[str, Any]] | None = None,
    between: Iterable[dict[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run with two evaluations of its held-out pairs; ``changes`` are those of its training records."""
    logs = directory / "logs"
    logs.mkdir(parents=True)
    config: Config = parse_arguments(["--data-path", "data/pairs", "--save", str(directory), *flags])
    config.save_config(logs / "config.yaml")
    before = pair_values(0.4) if before is None else before
    after = pair_values(0.8) if after is None else after
    records = [train_record(step, **changes) for step in range(1, steps + 1)]
    if before:
        records = [eval_record(0, before), *records, *between, eval_record(steps, after)]
        write_lines(logs / "held_out_pairs.first.jsonl", [{"step": 0, **pair} for pair in before])
        write_lines(logs / "held_out_pairs.jsonl", [{"step": steps, **pair} for pair in after])
    write_lines(logs / "metrics.jsonl", records)
    (logs / "run.json").write_text(json.dumps({"train_iters": steps, **(facts or {})}))
    return logs


def write_page_tokens(logs: Path, texts: Mapping[str, str], pair: int = 3, why: str = "most certain") -> None:
    """``token_logps.jsonl`` of a pair whose tokens are code points; no tokenizer decodes them."""
    lines: list[dict[str, Any]] = []
    for name, text in texts.items():
        line: dict[str, Any] = {"step": 30, "pair": pair, "why": why, "response": name, "token_ids": [ord(one) for one in text]}
        if name != "prompt":
            line["logps"] = [-0.1 * (number % 60) for number in range(len(text))]
            line["alone"] = [None, *(-0.2 * (number % 50) for number in range(1, len(text)))]
        lines.append(line)
    with (logs / "token_logps.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
