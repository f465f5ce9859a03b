"""The results of several runs as a picture of bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.comparison import COLUMNS, RunResult

# View -> (title of a panel, its columns).
_PANELS = {
    "margins": (
        ("held-out accuracy", ("accuracy",)),
        ("held-out margin", ("margin",)),
        ("target margin gamma", ("gamma_p5", "gamma_p50", "gamma_p95")),
    ),
    "objectives": (
        ("held-out accuracy", ("accuracy", "accuracy_mean", "accuracy_sum")),
        ("change of log p per token", ("chosen_change", "rejected_change")),
        ("pairs per second", ("pairs_per_second",)),
        ("peak memory, GiB", ("memory_gib",)),
    ),
}


def draw_picture(path: Path, results: Mapping[str, RunResult | None], view: str) -> None:
    """Write a bar chart of the runs that have results, a panel for each kind of number; a missing number has no bar.

    A mean over held-out pairs has its standard error drawn.

    Args:
        path: file to write; its extension says the format.
        results: run -> what is known of it.
        view: which numbers.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--picture {path}: the package matplotlib is missing. Install it with pip install 'megatron-rmipo[plots]', or leave "
            "the flag out."
        ) from error
    shown = {run: result for run, result in results.items() if result is not None}
    panels = _PANELS[view]
    figure = Figure(figsize=(3.6 * len(panels), 1.8 + 0.4 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, columns) in zip(grid[0], panels, strict=True):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            bars = [
                (row, result.values[column]) for row, result in enumerate(shown.values()) if result.values[column] is not None
            ]
            places = [row + (number - (len(columns) - 1) / 2) * height for row, _ in bars]
            errors = [list(shown.values())[row].errors.get(column) or 0.0 for row, _ in bars]
            error_bars = {"xerr": errors, "ecolor": "black"} if any(errors) else {}
            axes.barh(places, [value for _, value in bars], height, label=COLUMNS[column][0], **error_bars)
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
        if len(columns) > 1:
            # Below, where no bar is.
            axes.legend(fontsize="small", ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    grid[0][0].set_yticks(range(len(shown)), list(shown))
    # The first run on top.
    grid[0][0].invert_yaxis()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: cannot be written: {error}") from error
