"""Runs side by side: every shown number against one worked by hand from records written here."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStoreWriter, TokenizedPair
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.reports.comparison import describe_passes, read_row, read_run, told_apart
from megatron_rmipo.reports.comparison_cli import main

BEFORE = {"rewards/accuracies": 0.4, "rewards/margins": 0.1, "logps/chosen": -0.5, "logps/rejected": -0.5, "loss": 1.0}
AFTER = {
    **{"rewards/accuracies": 0.9, "rewards/margins": 2.5, "logps/chosen": -0.75, "logps/rejected": -2.0, "loss": 0.25},
    **{"num_pairs": 3, "rewards/accuracies/se": 0.02, "rewards/margins/se": 0.125},
}
GAMMA = {"gamma/p5": 0.3, "gamma/p50": 0.4, "gamma/p95": 1.5}
# Means per token and tokens of three held-out pairs: sums -4 > -6, -6 < -4 and -10 < -9. By mean two are right, by sum one.
PAIRS = [(-1.0, -2.0), (-1.5, -2.0), (-2.0, -1.5)]
LENGTHS = [(4, 3), (4, 2), (5, 6)]


def write_held_out(prefix: Path, lengths: list[tuple[int, int]]) -> Path:
    with PairStoreWriter(prefix, vocab_size=100) as writer:
        for chosen, rejected in lengths:
            writer.add(TokenizedPair(np.ones(2, np.int64), np.ones(chosen, np.int64), np.ones(rejected, np.int64)))
        writer.finalize(Manifest(tokenizer=TokenizerInfo("f", 100, 1, 2)))
    return prefix


def write_run(
    directory: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    *flags: str,
    pairs: list[tuple[float, float | None]] = PAIRS,
    consumed: int = 64,
) -> Path:
    logs = directory / "logs"
    logs.mkdir(parents=True)
    records = [{"kind": "eval", "step": 0, "consumed_pairs": 0, **before}]
    # The first step is slow: a median, not a mean.
    for step, (speed, memory) in enumerate([(1.0, 0.5), (30.0, 0.75), (32.0, 0.75)], start=1):
        records.append({"kind": "train", "step": step, "pairs_per_second": speed, "memory_gib": memory})
    records.append({"kind": "eval", "step": 3, "consumed_pairs": consumed, **after})
    (logs / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Chosen responses move by another amount each, rejected ones all by the same.
    for name, step, move in (("held_out_pairs.first.jsonl", 0, 0.25), ("held_out_pairs.jsonl", 3, 0.0)):
        rows = [
            {"step": step, "logps/chosen": chosen + move * number, "logps/rejected": rejected and rejected + 4 * move}
            for number, (chosen, rejected) in enumerate(pairs)
        ]
        (logs / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    parse_arguments(["--data-path", "absent", *flags]).save_config(logs / "config.yaml")
    return directory


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def shown(output: str) -> dict[str, list[str]]:
    """First column -> the other columns, of all tables' lines."""
    return {cells(line)[0]: cells(line)[1:] for line in output.splitlines() if line.startswith("|")}


def parts(output: str) -> list[dict[str, list[str]]]:
    """The rows of the first part of every table, and of the second part."""
    found: list[dict[str, list[str]]] = [{}, {}]
    blocks = [block for block in output.split("\n\n") if block.startswith("|")]
    for number, block in enumerate(blocks):
        found[number % 2] |= shown(block)
    return found


def test_every_number_of_a_run(tmp_path: Path) -> None:
    held_out = write_held_out(tmp_path / "valid", LENGTHS)
    result = read_run(write_run(tmp_path / "run", BEFORE, {**AFTER, **GAMMA}, "--valid-data-path", str(held_out)))
    assert result is not None
    assert result.values == pytest.approx(
        {
            **{"accuracy_before": 0.4, "accuracy": 0.9, "accuracy_change": 0.5},
            # Before, no pair was right: means of -1, -1.25 and -1.5 against -1, -1 and -0.5.
            **{"accuracy_mean_before": 0.0, "accuracy_mean": 2 / 3, "accuracy_mean_change": 2 / 3},
            **{"accuracy_sum_before": 0.0, "accuracy_sum": 1 / 3, "accuracy_sum_change": 1 / 3},
            **{"margin_before": 0.1, "margin": 2.5, "margin_change": 2.4},
            "gamma_p5": 0.3,
            "gamma_p50": 0.4,
            "gamma_p95": 1.5,
            **{"loss_before": 1.0, "loss": 0.25, "loss_change": -0.75},
            "chosen_change": -0.25,
            "rejected_change": -1.5,
            "pairs_per_second": 30.0,
            "memory_gib": 0.75,
            "pairs": 64,
            "held_out_pairs": 3,
        }
    )
    # sqrt(2/3 * 1/3 / 3); differences of 0, -0.25 and -0.5 have a standard deviation of 0.25.
    errors = {"accuracy": 0.02, "accuracy_mean": 0.27217, "accuracy_sum": 0.27217, "margin": 0.125, "chosen_change": 0.144338}
    # Two of three pairs, and one of three, have become right.
    errors |= {"accuracy_mean_change": 1 / 3, "accuracy_sum_change": 1 / 3}
    assert {name: error for name, error in result.errors.items() if error is not None} == pytest.approx(errors, abs=1e-5)
    assert result.passes == "log p(y)"


def test_held_out_pairs_are_found_by_split_and_number(tmp_path: Path) -> None:
    # The last three of six, and of those the first two.
    data = write_held_out(tmp_path / "train", [(1, 9), (1, 9), (1, 9), *LENGTHS])
    flags = ("--split", "50,50", "--eval-pairs", "2")
    run = write_run(tmp_path / "run", BEFORE, AFTER, "--data-path", str(data), *flags, pairs=PAIRS[:2])
    result = read_run(run)
    assert result is not None
    assert result.values["accuracy_sum"] == 0.5


def test_without_the_prepared_data_only_the_sums_are_missing(tmp_path: Path) -> None:
    result = read_run(write_run(tmp_path / "run", BEFORE, AFTER, "--valid-data-path", str(tmp_path / "gone")))
    assert result is not None
    assert result.values["accuracy_sum"] is None
    assert result.values["accuracy_mean"] == pytest.approx(2 / 3)
    # Nor are lengths of other pairs taken for these.
    assert told_apart([{"logps/chosen": -1.0, "logps/rejected": -2.0}], np.array([[1, 1], [1, 1]])) == []


def test_pairs_without_one_of_the_values_do_not_count() -> None:
    pairs = [{"logps/chosen": -1.0, "logps/rejected": -2.0}, {"logps/chosen": None, "logps/rejected": -9.0}]
    # Equal is not higher.
    equal = {"logps/chosen": -1.0, "logps/rejected": -1.0}
    assert told_apart([*pairs, equal, {"logps/chosen": -1.0}]) == [1.0, None, 0.0, None]
    assert told_apart([]) == []


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (LogpNeeds(), "-"),
        (LogpNeeds(rejected=False), "-"),
        (LogpNeeds(unconditional="none"), "log p(y)"),
        (LogpNeeds(reference=True, batch=True), "reference, once + whole batch before"),
        (LogpNeeds(reference=True, mismatched=True), "reference, once + mismatched pairs"),
        (LogpNeeds(perturbation=0.01), "resident reference"),
    ],
)
def test_needs_in_words(needs: LogpNeeds, words: str) -> None:
    assert describe_passes(needs) == words


def test_tables_name_each_run_as_often_as_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "a.1", BEFORE, {**AFTER, **GAMMA})
    write_run(runs / "b", BEFORE, AFTER, "--margin-schedule", "none")
    tables = ["--table", "Table 7", "exp=a.1", "none=b", "late=c", "--table", "Table 8", "[0, 2]=a.1", "--table", "Later", "c"]
    output = tmp_path / "out" / "v1.2"
    output.parent.mkdir()
    assert main(["--runs", str(runs), "--view", "margins", *tables, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    first, second = parts(text)
    means = ["3", "0.400", "0.900 +- 0.020", "+0.500", "0.100", "2.500 +- 0.125", "+2.400"]
    assert first["exp"] == first["[0, 2]"] == first["none"] == means
    loss = ["1.0000", "0.2500", "-0.7500"]
    assert second["exp"] == second["[0, 2]"] == ["0.300", "0.400", "1.500", *loss]
    assert second["none"] == ["-", "-", "-", *loss]
    assert first["late"] == ["-"] * 7
    # A column of one digit has a rule that Markdown knows.
    assert set(cells(text.splitlines()[3])[1:]) <= {"-" * width + ":" for width in range(1, 20)}
    # A table without a single result is none.
    assert "Later" not in text
    assert (output.parent / "v1.2.md").read_text() == text
    with (output.parent / "v1.2.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [(record["table"], record["row"], record["run"]) for record in records] == [
        ("Table 7", "exp", "a.1"),
        ("Table 7", "none", "b"),
        ("Table 8", "[0, 2]", "a.1"),
    ]
    assert (records[0]["gamma_p95"], records[1]["gamma_p95"], records[1]["passes"]) == ("1.5", "", "-")
    assert (records[0]["held_out_pairs"], records[0]["margin_se"], records[0]["loss_se"]) == ("3", "0.125", "")


def test_objectives_are_compared_by_what_all_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = ("--valid-data-path", str(write_held_out(tmp_path / "valid", LENGTHS)))
    write_run(tmp_path / "runs/rmipo", BEFORE, AFTER, *held_out)
    supervised = {"logps/chosen": -0.5, "loss": 0.5}, {"logps/chosen": -0.25, "loss": 0.25}
    write_run(tmp_path / "runs/sft", *supervised, "--objective", "sft", *held_out, pairs=[(-1.0, None)] * 3)
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    shares, rest = parts(capsys.readouterr().out)
    by_logp = ["0.000", "0.667 +- 0.272", "+0.667 +- 0.333", "0.000", "0.333 +- 0.272", "+0.333 +- 0.333"]
    assert shares["rmipo"] == ["3", "0.400", "0.900 +- 0.020", "+0.500", *by_logp]
    assert shares["sft"] == ["3", *["-"] * 9]
    cost = ["30.0", "0.75"]
    margins = ["0.100", "2.500 +- 0.125", "+2.400"]
    assert rest["rmipo"] == [*margins, "-0.250 +- 0.144", "-1.500", *cost, "log p(y)"]
    assert rest["sft"] == ["-", "-", "-", "+0.250 +- 0.144", "-", *cost, "-"]


def test_further_seeds_of_a_row_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    seeds = {"a": 0.9, "a.seed-1235": 0.7, "a.seed-1236": 0.8}
    for name, accuracy in seeds.items():
        write_run(runs / name, BEFORE, {**AFTER, "rewards/accuracies": accuracy})
    write_run(runs / "a.seed-x", BEFORE, AFTER)
    write_run(runs / "b", BEFORE, AFTER)
    # Not yet evaluated at its end.
    unfinished = write_run(runs / "b.seed-9", BEFORE, AFTER) / "logs/metrics.jsonl"
    unfinished.write_text(json.dumps({"kind": "eval", "step": 0}) + "\n")
    result = read_row(runs, "a")
    assert result is not None
    assert result.num_seeds == 3
    # The standard deviation of 0.9, 0.7, 0.8 is 0.1.
    assert (result.values["accuracy"], result.error("accuracy")) == pytest.approx((0.8, 0.1 / 3**0.5))
    assert result.errors["accuracy"] == pytest.approx(0.02)
    picture = tmp_path / "p.svg"
    flags = ["--output", str(tmp_path / "t"), *(["--picture", str(picture)] if importlib.util.find_spec("matplotlib") else [])]
    assert main(["--runs", str(runs), "--view", "margins", *flags]) == 0
    first, _ = parts(capsys.readouterr().out)
    assert first["a"][:5] == ["3", "3", "0.400", "0.800 +- 0.058", "+0.400 +- 0.058"]
    assert first["b"][:4] == ["1", "3", "0.400", "0.900 +- 0.020"]
    assert {"a", "a.seed-x", "b"} <= set(first)
    assert not {"a.seed-1235", "b.seed-9"} & set(first)
    with (tmp_path / "t.csv").open(newline="") as file:
        record = next(row for row in csv.DictReader(file) if row["run"] == "a")
    assert (record["seeds"], float(record["accuracy_se"]), float(record["accuracy_se_seeds"])) == (
        "3",
        pytest.approx(0.02),
        pytest.approx(0.1 / 3**0.5),
    )
    if picture.exists():
        assert "over the seeds of a row (up to 3)" in picture.read_text()


def test_different_lengths_of_training_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a", BEFORE, AFTER)
    write_run(tmp_path / "runs/b", BEFORE, AFTER)
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    assert "Not comparable" not in capsys.readouterr().out
    write_run(tmp_path / "runs/c", BEFORE, AFTER, consumed=32)
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr().out
    assert "trained on different numbers of pairs (32: c; 64: a, b)" in told
    assert "evaluated" not in told
    write_run(tmp_path / "runs/d", BEFORE, {**AFTER, "num_pairs": 2})
    assert main(["--runs", str(tmp_path / "runs")]) == 0
    assert "evaluated on different numbers of pairs (2: d; 3: a, b, c)" in capsys.readouterr().out


def test_a_picture_shows_the_runs_there_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "runs/rmipo", BEFORE, {**AFTER, **GAMMA})
    write_run(tmp_path / "runs/sft", {"logps/chosen": -0.5}, {"logps/chosen": -0.25}, "--objective", "sft", pairs=[])
    for view in ("margins", "objectives"):
        file = tmp_path / "pictures" / f"{view}.svg"
        arguments = ["--runs", str(tmp_path / "runs"), "--view", view, "--table", "T", "rmipo", "sft", "later"]
        assert main([*arguments, "--picture", str(file)]) == 0
        drawn = file.read_text()
        for text in ("sft", "held-out accuracy", "change of accuracy", "before"):
            assert f">{text}</text>" in drawn
        assert ">n = 3 held-out pairs; error bars: standard error over the held-out pairs</text>" in drawn
        assert ">later</text>" not in drawn


def test_without_matplotlib_the_tables_are_still_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs/a", BEFORE, AFTER)
    # As if it were not installed.
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["--runs", str(tmp_path / "runs"), "--picture", str(tmp_path / "p.png")]) == 1
    captured = capsys.readouterr()
    assert parts(captured.out)[0]["a"][2] == "0.900 +- 0.020"
    assert "megatron-rmipo[plots]" in captured.err


def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert main(["--runs", str(runs)]) == 1
    assert "no folder in it is a run" in capsys.readouterr().err
    assert main(["--runs", str(runs), "--table", "T", "a"]) == 1
    assert "train them first" in capsys.readouterr().err
    assert main(["--runs", str(runs), "--table", "a"]) == 1
    assert "names no run" in capsys.readouterr().err
    run = write_run(runs / "a", BEFORE, AFTER)
    assert main(["--runs", str(runs), "--output", str(tmp_path / "absent" / "t")]) == 1
    assert "--output" in capsys.readouterr().err
    assert main(["--runs", str(runs), "--picture", str(tmp_path / "t.colour")]) == 1
    assert "t.colour: cannot be written" in capsys.readouterr().err
    (run / "logs/config.yaml").unlink()
    assert main(["--runs", str(runs)]) == 1
    assert "config.yaml" in capsys.readouterr().err
    # Interrupted before its last evaluation.
    (run / "logs/metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0}) + "\n")
    assert read_run(run) is None
