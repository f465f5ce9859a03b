import numpy as np
import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.sensitivity import GridRun, draw_sensitivity, find_grids, margin_text

MEASURE = "held-out accuracy"


def grid_run(label: str, objective: str, accuracy: float, **options: object) -> GridRun:
    return GridRun(label, objective, options, {MEASURE: (accuracy, 0.0625, 0.25)})


def map_runs() -> list[GridRun]:
    """Beta 1 and 2, three pairs of bounds, one setting missing and one with two seeds."""
    bounds = [(0.0, 2.0), (0.3, 1.6), (1.0, 1.2)]
    runs = [
        grid_run(f"{beta}-{low}", "rmipo", 0.5 + beta / 8 + low / 16, beta=beta, gamma_min=low, gamma_max=high, lr=1e-6)
        for beta in (2.0, 1.0)
        for low, high in bounds
        if (beta, low) != (1.0, 0.3)
    ]
    return [*runs, grid_run("again", "rmipo", 1.0, beta=2.0, gamma_min=0.0, gamma_max=2.0, lr=1e-6)]


def test_grids_are_runs_that_differ_in_beta_and_margins_alone() -> None:
    linear = [
        grid_run(f"l{beta}", "rmipo", 0.5, beta=beta, gamma_min=0.3, margin_schedule="linear", lr=1e-6) for beta in (1.0, 2.0)
    ]
    alone = grid_run("alone", "rmipo", 0.5, beta=1.0, gamma_min=0.3, gamma_max=1.6, lr=1e-5)
    simpo = [grid_run(f"s{ratio}", "simpo", 0.5, beta=2.0, gamma_beta_ratio=ratio) for ratio in (0.5, 0.25)]
    grids, left_out = find_grids([*map_runs(), *linear, alone, *simpo])
    assert [(grid.title, len(grid.runs)) for grid in grids] == [("rmipo", 6), ("rmipo, margin_schedule linear", 2), ("simpo", 2)]
    assert left_out == [alone]
    assert (grids[0].betas, grids[0].margins) == ([1.0, 2.0], [(0.0, 2.0), (0.3, 1.6), (1.0, 1.2)])
    assert (grids[2].betas, grids[2].margins) == ([2.0], [(0.25,), (0.5,)])
    assert [margin_text(margin) for margin in [(0.3, 1.6), (0.25,), ()]] == ["[0.3, 1.6]", "0.25", "none"]
    with pytest.raises(ConfigError, match="no two of them differ in beta"):
        find_grids([alone, *simpo[:1]])


def test_a_map_shows_every_setting_and_marks_those_without_a_run() -> None:
    grids, _ = find_grids(map_runs())
    figure = draw_sensitivity(grids)
    axes, bar = figure.axes
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    # By rising beta; two seeds make a mean.
    assert values == pytest.approx(np.array([[0.625, np.nan, 0.6875], [0.875, 0.76875, 0.8125]]), nan_ok=True)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.625", "missing", "0.688", "0.875\n(2 runs)", "0.769", "0.812"]
    (missing,) = axes.patches
    assert missing.get_hatch() == "///"
    # The first row is on top, its second cell in the middle.
    box = missing.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    x, y = axes.transData.transform((1, 0))
    assert box.contains(x, y)
    assert not box.contains(*axes.transData.transform((1, 1)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["[0, 2]", "[0.3, 1.6]", "[1, 1.2]"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert axes.get_xlabel() == "gamma bounds   (before training: 0.250)"
    assert bar.get_ylabel() == MEASURE
    # Grey tells them apart: the lightness of the colours rises with the value.
    shades = axes.images[0].cmap(np.linspace(0, 1, 9))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(shades) > 0.02).all()


def test_a_line_shows_what_varies_with_errors_and_the_result_before() -> None:
    dpo = [grid_run(f"d{beta}", "dpo", 0.5 + beta, beta=beta) for beta in (0.05, 0.01)]
    # Only one of these has been judged.
    simpo = [grid_run(f"s{ratio}", "simpo", 0.75, beta=2.0, gamma_beta_ratio=ratio) for ratio in (0.5, 0.25)]
    simpo[0] = GridRun("s", "simpo", simpo[0].options, {**simpo[0].results, "judge's win rate": (0.625, None, None)})
    grids, _ = find_grids([*dpo, *simpo])
    figure = draw_sensitivity(grids)
    (first, second), (no_judge, judged) = figure.axes[:2], figure.axes[2:]
    assert (first.get_xlabel(), second.get_xlabel()) == ("beta", "gamma / beta   (beta = 2)")
    assert list(first.lines[0].get_ydata()) == pytest.approx([0.51, 0.55])
    assert [label.get_text() for label in first.get_xticklabels()] == ["0.01", "0.05"]
    (dashed,) = [line for line in first.lines if line.get_linestyle() == "--"]
    assert set(dashed.get_ydata()) == {0.25}
    errors = first.collections[0].get_segments()  # type: ignore[attr-defined]
    assert errors[0][:, 1] == pytest.approx([0.51 - 0.0625, 0.51 + 0.0625])
    assert first.get_ylim() == second.get_ylim()
    assert (judged.get_ylabel(), list(judged.lines[0].get_xdata()), list(judged.lines[0].get_ydata())) == (
        "judge's win rate",
        [1],
        [0.625],
    )
    assert (len(judged.patches), len(no_judge.patches)) == (1, 2)
