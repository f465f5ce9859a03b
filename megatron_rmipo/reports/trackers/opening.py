"""The trackers that a run's flags name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.config.schema import LoggingConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.trackers.base import Tracker
from megatron_rmipo.reports.trackers.mlflow_runs import MLflow
from megatron_rmipo.reports.trackers.tensorboard import TensorBoard
from megatron_rmipo.reports.trackers.weights_and_biases import WeightsAndBiases


def tracker_packages(flags: LoggingConfig) -> dict[str, str]:
    """The optional packages that a run needs for its trackers -> the flag that asks for each."""
    asked = {"wandb": ("--wandb-project", flags.wandb_project), "mlflow": ("--mlflow-experiment", flags.mlflow_experiment)}
    return {package: flag for package, (flag, value) in asked.items() if value is not None}


def open_trackers(flags: LoggingConfig, log_dir: Path, config: Mapping[str, Any], resumed_step: int | None) -> list[Tracker]:
    """Open every tracker that was asked for. One rank of a run calls it.

    Args:
        flags: that name them.
        log_dir: of the run; made where it is not there.
        config: the run's configuration, flat, of plain types.
        resumed_step: the step a resumed run has reached, None for a new run.

    Raises:
        ConfigError: a package is missing, or a directory cannot be written.
    """
    resumes = resumed_step is not None
    trackers: list[Tracker] = []
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        if flags.tensorboard_dir is not None:
            trackers.append(TensorBoard(Path(flags.tensorboard_dir), resumed_step))
        if flags.wandb_project is not None:
            trackers.append(WeightsAndBiases(log_dir, flags.wandb_project, flags.wandb_exp_name, config, resumes=resumes))
        if flags.mlflow_experiment is not None:
            trackers.append(MLflow(log_dir, flags.mlflow_experiment, config, resumes=resumes))
    except OSError as error:
        raise ConfigError(f"--log-dir {log_dir}: cannot be written: {error.strerror}. Name another directory.") from error
    return trackers
