"""What the program lm-eval writes, as an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.evaluation_file import Cell, Evaluation, EvaluationTable

TITLE = "lm-eval"
_RESULTS = "results_*.json"
_ERROR = "_stderr"


def find_results(directory: Path) -> Path | None:
    """The newest results below an ``--output_path`` of lm-eval; None where there are none."""
    # Their names end with the time.
    return max(directory.rglob(_RESULTS), key=lambda path: path.name.rpartition("results_")[2], default=None)


def parse_lm_eval(path: Path, found: Mapping[str, Any]) -> Evaluation:
    """The results in the content of a file of lm-eval, which :func:`is_lm_eval` says it is."""
    rows = [row for task, metrics in found["results"].items() for row in _task_rows(task, metrics, found)]
    template = "with the model's chat template" if found.get("chat_template") else "without a chat template"
    note = f"lm-eval {found.get('lm_eval_version', '')}, {template}; n is the number of questions."
    table = EvaluationTable(TITLE, ["task", "metric", "value", "+-", "n"], rows, note)
    known = ("config", "versions", "n-shot", "task_hashes", "chat_template_sha", "lm_eval_version", "transformers_version")
    details = {name: found[name] for name in known if name in found}
    return Evaluation("lm_eval", TITLE, str(found.get("model_name", "")), [table], {**details, "file": str(path)})


def is_lm_eval(found: object) -> bool:
    """Whether a JSON document is one of lm-eval."""
    return isinstance(found, dict) and isinstance(found.get("results"), dict) and "configs" in found


def _task_rows(task: str, metrics: Mapping[str, Any], found: Mapping[str, Any]) -> list[list[Cell]]:
    # The indentation of a task says to which group it belongs.
    name = str(metrics.get("alias", task)).strip() or task
    samples = found.get("n-samples", {}).get(task, {}).get("effective")
    rows: list[list[Cell]] = []
    for metric, value in metrics.items():
        kind, _, selection = metric.partition(",")
        if not selection or kind.endswith(_ERROR) or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{kind}{_ERROR},{selection}")
        label = kind if selection == "none" else f"{kind} ({selection})"
        rows.append([name, label, float(value), error if isinstance(error, int | float) else None, samples])
    return rows
