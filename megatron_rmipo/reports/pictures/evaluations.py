"""Win rates that a judge found, out of the files in which evaluations leave their results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.wins import DEVIATIONS, WinRate

JUDGED = "judge_pairwise"
# What a column of a table is, by how its name begins.
_WINS, _TIES = "win", "tie"
_COUNTS = ("n", "pairs", "prompts", "comparisons", "judged")
# The standard error of the column before it.
_ERROR = "+-"


def read_evaluation(path: Path) -> dict[str, Any]:
    """What an evaluation left: ``kind``, ``title``, ``model``, ``tables`` and more.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable evaluation: {error}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("tables"), list) or "kind" not in found:
        raise ConfigError(f"{path}: not an evaluation: it has no kind and tables. Name a file that an evaluation wrote.")
    return found


def judged_wins(label: str, paths: Sequence[Path]) -> list[WinRate]:
    """The win rates among some evaluations, a bar for each row of a table that has a column of wins.

    Args:
        label: what their model is called; empty for its own name.
        paths: of evaluations of any kind; those without a judge say nothing.
    """
    found: dict[tuple[str, str], WinRate] = {}
    for path in paths:
        evaluation = read_evaluation(path)
        if evaluation["kind"] != JUDGED:
            continue
        name = label or Path(str(evaluation.get("model") or path.stem)).name
        for table in evaluation["tables"]:
            for rate in _rates_of(name, table):
                found.setdefault((rate.label, rate.category), rate)
    return list(found.values())


def _rates_of(label: str, table: Mapping[str, Any]) -> list[WinRate]:
    columns = [str(column) for column in table["columns"]]
    wins, ties = _place(columns, _WINS), _place(columns, _TIES)
    if wins is None:
        return []
    count = next((place for place, column in enumerate(columns) if column.casefold() in _COUNTS), None)
    scale = 0.01 if "%" in columns[wins] else 1.0
    rates = []
    for row in table["rows"]:
        if not isinstance(row[wins], (int, float)):
            continue
        share = scale * row[wins]
        error = row[wins + 1] if columns[wins + 1 : wins + 2] == [_ERROR] else None
        beyond = None if error is None else DEVIATIONS * scale * error
        rates.append(
            WinRate(
                label,
                " ".join(cell for cell in row if isinstance(cell, str)) or str(table.get("title", "")),
                share,
                0.0 if ties is None or row[ties] is None else scale * row[ties],
                None if beyond is None else (max(0.0, share - beyond), min(1.0, share + beyond)),
                None if count is None else row[count],
            )
        )
    return rates


def _place(columns: Sequence[str], begins: str) -> int | None:
    return next((place for place, column in enumerate(columns) if column.casefold().startswith(begins)), None)
