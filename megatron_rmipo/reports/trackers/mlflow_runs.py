"""A run in MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.trackers.base import RememberedRun, Tracker, as_markdown

MLFLOW_RUN_FILE = "mlflow_run_id"


class MLflow(Tracker):
    """A run of an experiment, which a resumed run goes on with. The server is that of ``MLFLOW_TRACKING_URI``.

    Args:
        log_dir: of the run; its id is remembered there.
        experiment: where it belongs.
        config: the run's configuration, flat, of plain types; kept as ``config.yaml``, since parameters are limited in number.
        resumes: whether the run goes on.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, log_dir: Path, experiment: str, config: Mapping[str, Any], *, resumes: bool) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                f"--mlflow-experiment {experiment}: the package mlflow is missing. "
                "Install it with pip install 'megatron-rmipo[mlflow]', or leave the flag out."
            ) from error
        self._mlflow: Any = mlflow
        known = RememberedRun(log_dir / MLFLOW_RUN_FILE, resumes=resumes)
        mlflow.set_experiment(experiment)
        # An empty id is a new run.
        known.remember(mlflow.start_run(run_id=known.id).info.run_id)
        mlflow.log_dict(dict(config), "config.yaml")

    def log_numbers(self, kind: str, record: Mapping[str, float | int]) -> None:
        """Metrics; those that are not finite are left out, which not every store takes."""
        known = {f"{kind}/{name}": float(value) for name, value in record.items() if math.isfinite(value)}
        self._mlflow.log_metrics(known, step=int(record["step"]))

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """A file of the run, by step."""
        self._mlflow.log_figure(figure, f"{name}/step_{step:07d}.png")

    def log_table(self, name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
        """A file of the run, by step, in Markdown."""
        self._mlflow.log_text(as_markdown(rows), f"{name}/step_{step:07d}.md")

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()
