import json
from pathlib import Path

import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.summary import main, summarize_run


def write_run(directory: Path, *evaluations: dict[str, float], bounds: tuple[float | None, float | None] = (0.3, 1.6)) -> Path:
    records = [{"kind": "train", "step": 1, "loss": 9.0}]
    records += [{"kind": "eval", "step": 10 * number, **values} for number, values in enumerate(evaluations)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = ["null" if bound is None else str(bound) for bound in bounds]
    (directory / "config.yaml").write_text(f"gamma_min: {shown[0]}\ngamma_max: {shown[1]}\n")
    return directory


def margins(p50: float, p95: float) -> dict[str, float]:
    return {"gamma/p5": 0.3, "gamma/p50": p50, "gamma/p95": p95}


def test_the_first_and_the_last_evaluation_are_compared(tmp_path: Path) -> None:
    text = summarize_run(
        write_run(
            tmp_path,
            {"rewards/accuracies": 0.5, "rewards/margins": -0.25},
            {"rewards/accuracies": 0.1, "rewards/margins": 9.0},
            {"rewards/accuracies": 0.875, "rewards/margins": 1.5},
        )
    )
    assert text.splitlines()[1].split() == ["preference", "accuracy", "0.500", "0.875", "+0.375"]
    assert "accuracy rose from 0.500 to 0.875, the reward margin rose from -0.250 to 1.500 in 20 steps" in text
    assert "gamma" not in text


def test_a_fall_is_called_one(tmp_path: Path) -> None:
    text = summarize_run(write_run(tmp_path, {"rewards/accuracies": 0.9}, {"rewards/accuracies": 0.8}))
    assert "accuracy fell from 0.900 to 0.800" in text


def write_pairs(run: Path, gammas: list[float]) -> list[dict[str, float]]:
    """Eight held-out pairs of rising reward margin, one line each."""
    pairs = [
        {"rewards/margins": number - 2.0, "rewards/accuracies": float(number > 2), "gamma": gamma, "dpmi": float(number)}
        for number, gamma in enumerate(gammas)
    ]
    (run / "held_out_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


@pytest.mark.parametrize(
    ("gammas", "verdict"),
    [
        ([1.6, 1.5, 1, 1, 1, 0.9, 0.4, 0.3], "as the paper claims"),
        ([1.0] * 8, "does not show"),
        ([0.3] * 4 + [1.6] * 4, "does not show"),
    ],
)
def test_the_claim_is_judged_by_the_pairs_and_said_either_way(tmp_path: Path, gammas: list[float], verdict: str) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)})
    write_pairs(run, gammas)
    assert verdict in summarize_run(run)


def test_pairs_are_grouped_by_the_kind_of_their_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"loss": 1.0, **margins(1, 1)}, {"loss": 0.5, **margins(1, 1)})
    write_pairs(run, [1.6, 1.5, 1, 1, 1, 0.9, 0.4, 0.3])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"kind": "near" if number < 4 else "clear"}) + "\n" for number in range(8)))
    lines = summarize_run(run, rows).splitlines()
    assert lines[-2].split() == ["near", "4", "0.250", "-0.500", "1.275", "1.500"]
    assert lines[-1].split() == ["clear", "4", "1.000", "3.500", "0.650", "5.500"]
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
