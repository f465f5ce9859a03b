from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.errors import DataError
from megatron_rmipo.evaluation_file import Evaluation, EvaluationTable, write_evaluation
from megatron_rmipo.reports.pictures.evaluations import judged_wins
from megatron_rmipo.reports.pictures.wins import WinRate, count_wins, draw_wins, wilson_interval


@pytest.mark.parametrize(("wins", "total"), [(0, 5), (5, 5), (3, 7), (231, 256)])
def test_the_interval_holds_the_shares_that_the_wins_do_not_speak_against(wins: int, total: int) -> None:
    # Its ends solve |wins / total - p| = z sqrt(p (1 - p) / total).
    for end in wilson_interval(wins, total):
        if 0.0 < end < 1.0:
            assert abs(wins / total - end) == pytest.approx(1.959964 * (end * (1.0 - end) / total) ** 0.5)
    low, high = wilson_interval(wins, total)
    assert 0.0 <= low <= wins / total <= high <= 1.0
    assert low < high


def test_a_tie_is_half_of_a_win() -> None:
    rate = count_wins("a", "all", [0.5, 0.0, -1.0, 0.25], [0.5, 0.0, -1.0, -1.0])
    assert (rate.wins, rate.ties, rate.rate, rate.num_pairs, rate.before) == (0.5, 0.25, 0.625, 4, 0.375)
    assert rate.interval == wilson_interval(2.5, 4)
    assert count_wins("a", "all", [1.0]).before is None


def test_what_is_drawn() -> None:
    rates = [
        WinRate("rmipo", "helpful", 0.5, 0.25, (0.375, 0.75), 40, 0.125),
        WinRate("rmipo", "harmless", 0.75, 0.0, None, None),
        WinRate("simpo", "harmless", 0.25, 0.0, (0.0, 0.5), 9),
    ]
    figure = draw_wins(rates, "who won")
    (axes,) = figure.axes
    bars = [(bar.get_x(), bar.get_width(), bar.get_hatch()) for bar in axes.patches]
    # A bar each, and the ties behind the first one.
    assert [(left, width) for left, width, _ in bars] == [(0, 50), (50, 25), (0, 75), (0, 25)]
    assert (bars[0][2], bars[2][2], bars[3][2]) == ("", "///", "///")
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places == pytest.approx([-0.2, -0.2, 0.2, 1.2])
    ends = [
        segment[:, 0].tolist()
        for bar in axes.containers
        if hasattr(bar, "has_xerr")
        for segment in bar.lines[2][0].get_segments()
    ]
    assert ends == [pytest.approx([37.5, 75.0]), pytest.approx([0.0, 50.0])]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"] == [12.5]
    assert [text.get_text() for text in axes.texts] == ["62.5  (n = 40)", "75.0", "25.0  (n = 9)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rmipo", "simpo"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["helpful", "harmless", "ties, half of a win each", "before training", "95 % interval"]
    (axes,) = draw_wins([rates[1]], "who won").axes
    assert not axes.figure.legends  # type: ignore[union-attr]


def write(path: Path, kind: str, columns: list[str], rows: list[list[Any]]) -> Path:
    table = EvaluationTable("AlpacaEval 2", columns, rows)
    write_evaluation(path, Evaluation(kind, "t", "models/rmipo-hf", [table]))
    return path


def test_a_judges_wins_are_read_from_the_tables_of_evaluations(tmp_path: Path) -> None:
    columns = ["questions", "n", "win rate", "+-", "at equal length", "+-", "wins", "ties", "losses"]
    rows = [["all", 45, 0.625, 0.05, 0.5, 0.1, 20, 10, 10], ["math", 5, None, None, None, None, 0, 0, 0]]
    judged = write(tmp_path / "a.json", "judge_pairwise", columns, rows)
    scored = write(tmp_path / "b.json", "evaluate_pairs", columns, rows)
    other = write(tmp_path / "c.json", "judge_pairwise", ["what", "value"], [["cost", 1.0]])
    (rate,) = judged_wins("", [judged, scored])
    assert (rate.label, rate.category, rate.wins, rate.ties, rate.rate, rate.num_pairs) == (
        "rmipo-hf",
        "all",
        0.5,
        0.25,
        0.625,
        40,
    )
    assert rate.interval == pytest.approx((0.625 - 1.959964 * 0.05, 0.625 + 1.959964 * 0.05))
    plain = write(tmp_path / "d.json", "judge_pairwise", ["win rate"], [[0.5]])
    assert judged_wins("mine", [plain]) == [WinRate("mine", "all", 0.5, 0.0)]
    assert [rate.label for rate in judged_wins("mine", [judged, plain, other])] == ["mine (a)", "mine (d)"]
    for text, words in (("{", "not a readable evaluation"), ('{"kind": "x"}', "it lacks one of kind, title, model, tables")):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(DataError, match=words):
            judged_wins("", [tmp_path / "e.json"])
