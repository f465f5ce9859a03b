"""A run in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.trackers.base import RememberedRun, Tracker

WANDB_RUN_FILE = "wandb_run_id"


class WeightsAndBiases(Tracker):
    """A run of the service, which a resumed run goes on with.

    Args:
        log_dir: of the run; its id is remembered there.
        project: where it belongs.
        name: of the run.
        config: the run's configuration, flat, of plain types.
        resumes: whether the run goes on.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, log_dir: Path, project: str, name: str | None, config: Mapping[str, Any], *, resumes: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--wandb-project {project}: the package wandb is missing. "
                "Install it with pip install 'megatron-rmipo[wandb]', or leave the flag out."
            ) from error
        self._wandb: Any = wandb
        known = RememberedRun(log_dir / WANDB_RUN_FILE, resumes=resumes)
        self._run: Any = wandb.init(
            project=project, name=name, config=dict(config), dir=str(log_dir), id=known.id, resume="allow"
        )
        known.remember(self._run.id)
        # A resumed run may log a step again; with a step of our own none is refused.
        self._run.define_metric("*", step_metric="step")

    def log_numbers(self, kind: str, record: Mapping[str, float | int]) -> None:
        """Numbers over our own step."""
        named = {f"{kind}/{name}": value for name, value in record.items() if name != "step"}
        self._run.log({"step": record["step"], **named})

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """An image."""
        self._run.log({"step": step, name: self._wandb.Image(figure)})

    def log_table(self, name: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
        """A table."""
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"step": step, name: table})

    def close(self) -> None:
        """Tell the service that the run has ended."""
        self._run.finish()
