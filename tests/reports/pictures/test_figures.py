"""From logs to figures: what is drawn of which pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStoreWriter, TokenizedPair
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation_file import Evaluation, EvaluationTable, write_evaluation
from megatron_rmipo.reports.pictures.densities import density
from megatron_rmipo.reports.pictures.figures import (
    Drawing,
    plot_gaps,
    plot_rewards,
    plot_schedule,
    plot_sensitivity,
    plot_training,
    plot_wins,
)
from megatron_rmipo.reports.pictures.rewards import in_own_units, jitter, wasserstein_distance
from tests.reports.pictures.made_up import FIRST, KINDS, LAST, runs_of, write_rows, write_run


def test_gaps_are_drawn_by_category_before_and_after(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", subset=KINDS)
    runs = runs_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", last=FIRST))
    figure, left_out = plot_gaps(Drawing(runs, rows=rows, category="subset"))
    titles = ["a: first evaluation", "b: first evaluation", "a: last evaluation", "b: last evaluation"]
    assert [axes.get_title() for axes in figure.axes] == titles
    first, _, last, same = figure.axes
    for axes, gaps in ((first, FIRST), (last, LAST), (same, FIRST)):
        # The larger category first, each with dashes of its own; then the line at zero.
        clear, near = axes.lines[:2]
        for line, kind in ((clear, "clear"), (near, "near")):
            of_kind = np.array([gap for gap, name in zip(gaps, KINDS, strict=True) if name == kind])
            assert line.get_ydata() == pytest.approx(density(of_kind, np.asarray(line.get_xdata())))
        assert str(clear._dash_pattern) != str(near._dash_pattern)  # type: ignore[attr-defined]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clear (n = 4)", "near (n = 3)"]
    assert left_out == []
    # Without rows all are one category.
    assert [text.get_text() for text in plot_gaps(Drawing(runs))[0].legends[0].get_texts()] == ["all pairs (n = 7)"]


def test_wins_are_counted_by_category(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", kind=KINDS)
    runs = runs_of(write_run(tmp_path / "a"))
    figure, _ = plot_wins(Drawing(runs, rows=rows))
    (axes,) = figure.axes
    # clear: 3 of 4 after, 3 before; near: 1 of 3 and a tie after, a tie before.
    assert [text.get_text() for text in axes.texts] == ["75.0  (n = 4)", "50.0  (n = 3)"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([75.0, 100 / 3, 100 / 3])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"] == pytest.approx([75.0, 50 / 3])
    with pytest.raises(ConfigError, match="no evaluation of the kind judge_pairwise"):
        plot_wins(Drawing(runs, wins_by="judge"))


def test_runs_without_what_a_figure_needs_are_left_out_with_the_reason(tmp_path: Path) -> None:
    runs = runs_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", "--objective", "simpo"))
    (tmp_path / "b/logs/held_out_pairs.jsonl").unlink()
    for plot, words in (
        (plot_gaps, "b/logs/held_out_pairs.jsonl is missing"),
        (plot_schedule, "b/logs is a run of objective simpo"),
    ):
        figure, (reason,) = plot(Drawing(runs))
        assert words in reason
        assert len(figure.axes) == 2
        with pytest.raises(ConfigError, match=words):
            plot(Drawing(runs[1:]))
    with pytest.raises(ConfigError, match="evaluations alone"):
        plot_training(Drawing([]))


def test_scores_are_those_of_the_rows(tmp_path: Path) -> None:
    scores = [1.0, 2.0, 1.0, 3.0, 2.0, 1.0, 2.0]
    runs = runs_of(write_run(tmp_path / "a"))
    # One has no score, and counts in neither.
    own = write_rows(tmp_path / "own.jsonl", gap=[*scores[:6], None])
    public = write_rows(tmp_path / "public.jsonl", score_chosen=[score + 1.0 for score in scores], score_rejected=[1.0] * 7)
    for rows, field, count in ((own, "gap", 6), (public, None, 7)):
        figure, _ = plot_rewards(Drawing(runs, rows=rows, scores=field))
        distance = wasserstein_distance(
            in_own_units(jitter(np.array(scores[:count]))), in_own_units(2.0 * np.array(LAST[:count]))
        )
        assert f"a: distance {distance:.3f} (n = {count})" in [text.get_text() for text in figure.legends[0].get_texts()]
    with pytest.raises(ConfigError, match=r"no scores beside its held-out pairs.*--rows FILE"):
        plot_rewards(Drawing(runs))
    words = write_rows(tmp_path / "words.jsonl", gap=["far"] * 7, kind=KINDS)
    with pytest.raises(ConfigError, match=r"words\.jsonl:1: --scores gap: a number expected, found 'far'"):
        plot_rewards(Drawing(runs, rows=words, scores="gap"))
    with pytest.raises(ConfigError, match="no pair has both"):
        plot_rewards(Drawing(runs, rows=words))
    few = write_rows(tmp_path / "few.jsonl", gap=scores[:3], kind=KINDS[:3])
    for plot in (plot_rewards, plot_gaps):
        with pytest.raises(ConfigError, match="3 rows, but 7 held-out pairs were evaluated"):
            plot(Drawing(runs, rows=few))
    with pytest.raises(ConfigError, match="no field 'topic'; it has 'gap', 'kind'"):
        plot_gaps(Drawing(runs, rows=few, category="topic"))


def test_scores_may_stand_beside_the_prepared_pairs(tmp_path: Path) -> None:
    with PairStoreWriter(tmp_path / "pairs", vocab_size=100, columns=["margin"]) as writer:
        for number in range(7):
            writer.add(TokenizedPair(*(np.ones(length, np.int64) for length in (2, 3, 4))), [number / 2])
        writer.finalize(Manifest(tokenizer=TokenizerInfo("f", 100, 1, 2)))
    figure, _ = plot_rewards(Drawing(runs_of(write_run(tmp_path / "a", "--valid-data-path", str(tmp_path / "pairs")))))
    distance = wasserstein_distance(in_own_units(jitter(np.arange(7) / 2)), in_own_units(2.0 * np.array(LAST)))
    assert f"a: distance {distance:.3f} (n = 7)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_schedule_is_drawn_of_runs_of_rmipo(tmp_path: Path) -> None:
    runs = runs_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", "--preset", "paper", "--gamma-max", "2"))
    figure, _ = plot_schedule(Drawing(runs))
    schedule, margins = figure.axes
    assert [line.get_ydata()[0] for line in schedule.lines[::2]] == pytest.approx([1.6, 2.0])
    assert list(schedule.lines[1].get_xdata()) == pytest.approx(LAST)
    # Two first evaluations, pale, then two last ones.
    assert [line.get_alpha() for line in margins.lines] == [0.35, 0.35, None, None]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a (per_token): median gamma 0.50", "b (paper): median gamma 0.50", "first evaluation"]


def test_a_grid_is_read_from_configurations_with_a_judges_scores(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"b{beta}", "--beta", beta, accuracies=(0.25, float(beta) / 4)) for beta in ("1", "3")]
    write_run(tmp_path / "other", "--beta", "2", "--lr", "1e-3")
    table = EvaluationTable("t", ["win rate"], [[0.625]])
    write_evaluation(folders[1] / "evaluation/judge.json", Evaluation("judge_pairwise", "t", "m", [table]))
    figure, left_out = plot_sensitivity(Drawing(runs_of(tmp_path)))
    accuracy, judge = figure.axes
    assert list(accuracy.lines[0].get_ydata()) == [0.25, 0.75]
    assert list(judge.lines[0].get_ydata()) == [0.625]
    assert accuracy.get_xlabel() == "beta   (gamma bounds = [0.3, 1.6])"
    assert left_out == ["other differs from every other run in more than beta and its margin."]


def test_hours_of_gpus_are_those_of_all_ranks(tmp_path: Path) -> None:
    runs = runs_of(write_run(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"--x gpu-hours: .*run\.json does not say on how many ranks a ran"):
        plot_training(Drawing(runs, unit="gpu-hours"))
    (runs[0].log_dir / "run.json").write_text('{"ranks": 4}')
    figure, _ = plot_training(Drawing(runs, unit="gpu-hours"))
    assert figure.axes[0].get_xlabel() == "GPU-hours of training"
    assert [bar.get_width() for bar in figure.axes[3].patches] == pytest.approx([4 * 32 / 60])
    assert figure.axes[3].get_title() == "GPU-minutes of training"
