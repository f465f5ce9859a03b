import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.metrics import summarize_held_out
from megatron_rmipo.reports.reporter import Reporter, evaluation_kind
from megatron_rmipo.reports.summary import read_evaluations, summarize_run
from megatron_rmipo.reports.summary_cli import main


def write_run(directory: Path, *evaluations: dict[str, float], bounds: tuple[float | None, float | None] = (0.3, 1.6)) -> Path:
    records = [{"kind": "train", "step": 1, "loss": 9.0}]
    records += [{"kind": "eval", "step": 10 * number, **values} for number, values in enumerate(evaluations)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = ["null" if bound is None else str(bound) for bound in bounds]
    (directory / "config.yaml").write_text(f"gamma_min: {shown[0]}\ngamma_max: {shown[1]}\n")
    return directory


def margins(p50: float, p95: float) -> dict[str, float]:
    return {"gamma/p5": 0.3, "gamma/p50": p50, "gamma/p95": p95}


def words_of(line: str) -> str:
    return " ".join(line.split())


def pair_lines(run: Path, name: str, step: int, **columns: list[Any]) -> None:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (run / name).write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows))


def test_the_first_and_the_last_evaluation_are_compared(tmp_path: Path) -> None:
    known = {"num_pairs": 80, "rewards/accuracies/se": 0.05, "rewards/margins/se": 0.125}
    text = summarize_run(
        write_run(
            tmp_path,
            {"rewards/accuracies": 0.5, "rewards/margins": -0.25, **known},
            {"rewards/accuracies": 0.1, "rewards/margins": 9.0, **known},
            {"rewards/accuracies": 0.875, "rewards/margins": 1.5, **known},
        )
    )
    assert words_of(text.splitlines()[0]) == "held-out pairs (n = 80) before after change"
    assert words_of(text.splitlines()[1]) == "preference accuracy 0.500 +- 0.050 0.875 +- 0.050 +0.375"
    # The errors of two evaluations of the same pairs do not tell that of their difference.
    assert "accuracy went from 0.500 to 0.875, the reward margin went from -0.250 to 1.500 in 20 steps; without held_out" in text
    assert "gamma" not in text


@pytest.mark.parametrize(
    ("changed", "num_pairs", "words", "change"),
    [
        # (pairs from right to wrong, from wrong to right) of 64: the mean change and the error of the differences by hand.
        ((2, 18), 64, "accuracy rose from 0.500 to 0.750 in 10 steps (n = 64;", "+0.250 +- 0.063"),
        ((18, 2), 64, "accuracy fell from 0.500 to 0.250 in 10 steps (n = 64;", "-0.250 +- 0.063"),
        ((8, 10), 64, "accuracy did not move beyond its error, from 0.500 to 0.531", "+0.031 +- 0.067"),
        ((0, 18), 48, "accuracy went from 0.500 to 0.875 in 10 steps: not enough pairs to tell (n = 48, 50", "+0.375 +- 0.071"),
        ((0, 1), 2, "not enough pairs to tell (n = 2, 50 or more would do)", "+0.500 +- 0.500"),
    ],
)
def test_a_change_is_one_beyond_its_error_alone(
    tmp_path: Path, changed: tuple[int, int], num_pairs: int, words: str, change: str
) -> None:
    half = num_pairs // 2
    before = [1.0] * half + [0.0] * half
    after = [0.0] * changed[0] + [1.0] * (half - changed[0]) + [1.0] * changed[1] + [0.0] * (half - changed[1])
    ends = [{"rewards/accuracies": sum(right) / num_pairs, "num_pairs": num_pairs} for right in (before, after)]
    run = write_run(tmp_path, *ends)
    pair_lines(run, "held_out_pairs.first.jsonl", 0, **{"rewards/accuracies": before})
    pair_lines(run, "held_out_pairs.jsonl", 10, **{"rewards/accuracies": after})
    text = summarize_run(run)
    assert words in text
    assert text.splitlines()[1].endswith(change)
    # Pairs of another evaluation, as a resume from before it leaves them, are not taken for those of the last.
    pair_lines(run, "held_out_pairs.jsonl", 20, **{"rewards/accuracies": after})
    assert "+-" not in summarize_run(run)


@pytest.mark.parametrize(("margin", "is_tied"), [(0.0, True), (0.5, False)])
def test_an_accuracy_of_ties_alone_is_no_failure(tmp_path: Path, margin: float, is_tied: bool) -> None:
    columns = [
        {"rewards/accuracies": [right] * 64, "rewards/margins": [reward] * 64} for right, reward in ((0.0, margin), (1.0, 2.0))
    ]
    run = write_run(tmp_path, *({"num_pairs": 64, **{name: values[0] for name, values in one.items()}} for one in columns))
    pair_lines(run, "held_out_pairs.first.jsonl", 0, **columns[0])
    pair_lines(run, "held_out_pairs.jsonl", 10, **columns[1])
    text = summarize_run(run)
    assert "accuracy rose from 0.000 to 1.000" in text
    assert ("a tie does not count as right" in text) is is_tied


def test_what_a_run_writes_is_what_the_summary_reads(tmp_path: Path) -> None:
    # The demo's accuracies: 103 and 244 of 256 pairs.
    with Reporter(tmp_path, total_steps=64, stream=StringIO()) as reporter:
        for step, right in ((0, 103), (64, 244)):
            accuracies = torch.cat([torch.ones(right), torch.zeros(256 - right)])
            values = {"rewards/accuracies": accuracies, "rewards/margins": accuracies * 2 - 1}
            reporter.log("eval", {"step": step, **summarize_held_out(values)})
            reporter.log_pairs(step, {name: column.numpy() for name, column in values.items()})
    (tmp_path / "config.yaml").write_text("gamma_min: null\n")
    lines = summarize_run(tmp_path).splitlines()
    assert words_of(lines[0]) == "held-out pairs (n = 256) before after change"
    # The change pair by pair: 141 of 256 differ by 1, the others by 0.
    assert words_of(lines[1]) == "preference accuracy 0.402 +- 0.031 0.953 +- 0.013 +0.551 +- 0.031"
    assert "accuracy rose from 0.402 to 0.953, the reward margin rose from -0.195 to 0.906 in 64 steps (n = 256;" in lines[-1]


def test_every_held_out_set_has_its_table(tmp_path: Path) -> None:
    def evaluate(reporter: Reporter, step: int, name: str, right: int) -> None:
        values = {"rewards/accuracies": torch.cat([torch.ones(right), torch.zeros(60 - right)])}
        reporter.log(evaluation_kind(name), {"step": step, **summarize_held_out(values)})
        reporter.log_pairs(step, {name: column.numpy() for name, column in values.items()}, name)

    (tmp_path / "config.yaml").write_text("gamma_min: null\n")
    for names in (("", "chat"), ("chat", "code")):
        with Reporter(tmp_path, total_steps=64, stream=StringIO()) as reporter:
            for number, name in enumerate(names):
                evaluate(reporter, 0, name, 30)
                evaluate(reporter, 64, name, 45 + number)
            # One evaluation is nothing to compare.
            evaluate(reporter, 64, "late", 30)
        text = summarize_run(tmp_path)
        assert [line for line in text.splitlines() if line.startswith("==")] == [f"== {name}" for name in names if name]
        tables = [words_of(line) for line in text.splitlines() if line.startswith("preference accuracy")]
        assert [table.split()[5] for table in tables] == ["0.750", "0.767"]
        assert text.count("accuracy rose from 0.500 to") == 2
    with pytest.raises(ConfigError, match=r"no evaluations of a main held-out set in it, of chat, code alone"):
        read_evaluations(tmp_path)


def write_pairs(run: Path, gammas: list[float]) -> None:
    """Held-out pairs of rising reward margin, one line each."""
    numbers = [float(number) for number in range(len(gammas))]
    margins, right = [number - 2.0 for number in numbers], [float(number > 2) for number in numbers]
    pair_lines(
        run,
        "held_out_pairs.jsonl",
        10,
        **{"rewards/margins": margins, "rewards/accuracies": right, "gamma": gammas, "dpmi": numbers},
    )


@pytest.mark.parametrize(
    ("gammas", "verdict"),
    [
        ([1.6, 1.5] * 7 + [1.0] * 28 + [0.9, 0.4] * 7, ": as the paper claims"),
        ([1.0] * 56, "does not show"),
        ([0.3] * 28 + [1.6] * 28, "does not show"),
        # A tenth of a margin, with an error as large.
        ([1.6, 0.4] * 14 + [1.5, 0.3] * 14, "does not show"),
        # Beyond any error, and worth nothing.
        ([1.01] * 28 + [1.0] * 28, "does not show"),
        (
            [1.6, 1.5, 1, 1, 1, 0.9, 0.4, 0.3],
            "1.55 +- 0.05 on average, clear ones (the quarter of most) 0.35 +- 0.05, n = 2 each: not",
        ),
        ([1.0], "not enough pairs to tell (n = 1, 50 or more would do)"),
    ],
)
def test_the_claim_is_judged_by_the_pairs_and_said_either_way(tmp_path: Path, gammas: list[float], verdict: str) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)})
    write_pairs(run, gammas)
    assert verdict in summarize_run(run)


def test_pairs_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)})
    pair = '{"step": 10, "rewards/margins": null, "gamma": null, "rewards/accuracies": 0.0}\n'
    (run / "held_out_pairs.jsonl").write_text(pair * 3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"kind": "near"}\n' * 3)
    text = summarize_run(run, rows)
    assert "Ambiguous" not in text
    assert text.splitlines()[-1].split() == ["near", "3", "0.000"]


def test_pairs_are_grouped_by_the_kind_of_their_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)})
    write_pairs(run, [1.6, 1.5, 1, 1, 1, 0.9, 0.4, 0.3])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"kind": "near" if number < 4 else "clear"}) + "\n" for number in range(8)))
    lines = summarize_run(run, rows).splitlines()
    # Binomial for the share: sqrt(0.25 * 0.75 / 4). All right: no error is known from that.
    assert words_of(lines[-2]) == "near 4 0.250 +- 0.217 -0.500 +- 0.645 1.275 +- 0.160 1.500 +- 0.645"
    assert words_of(lines[-1]) == "clear 4 1.000 3.500 +- 0.645 0.650 +- 0.176 5.500 +- 0.645"
    rows.write_text('{"kind": "near"}\n')
    with pytest.raises(ConfigError, match="1 rows, but 8 held-out pairs"):
        summarize_run(run, rows)


def test_an_objective_without_margin_bounds_has_no_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)}, bounds=(None, 1.6))
    assert "Target margins" not in summarize_run(run)


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl.*cannot be read"):
        summarize_run(tmp_path)
    write_run(tmp_path, {"loss": 1.0})
    with pytest.raises(ConfigError, match="1 evaluations"):
        summarize_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "ev')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        summarize_run(tmp_path)


def test_the_tool_prints_where_the_model_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, {"loss": 1.0}, {"loss": 0.5})
    assert main(["--log-dir", str(tmp_path), "--model", "out/hf"]) == 0
    assert "out/hf" in capsys.readouterr().out
    assert main(["--log-dir", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["--log-dir", str(tmp_path), "--model", str(tmp_path)]) == 0
    assert f"The trained adapter, in the form of PEFT: {tmp_path}" in capsys.readouterr().out
