"""The picture of RMiPO's margins, and the tool that draws it of one run or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_rmipo.objectives.rmipo import Rmipo, RmipoConfig
from megatron_rmipo.reports.summary_cli import main
from tests.reports.test_summary import margins, pair_lines, write_run

SIGNALS = torch.linspace(-2.0, 9.0, 53)


def rmipo_run(directory: Path, **options: str | float) -> Path:
    """The logs of a run of rmipo with 53 held-out pairs."""
    logs = directory / "logs"
    logs.mkdir(parents=True)
    objective = Rmipo(RmipoConfig(**options))  # type: ignore[arg-type]
    write_run(logs, margins(0.9, 1.6), margins(0.8, 1.6))
    (logs / "config.yaml").write_text(yaml.safe_dump({"objective": "rmipo", "lr": 1e-6, **dataclasses.asdict(objective.config)}))
    columns = {
        "dpmi": SIGNALS.tolist(),
        "gamma": objective.target_margin(SIGNALS).tolist(),
        "rewards/margins": SIGNALS.tolist(),
        "logps/chosen": (-2.0 + 0.1 * SIGNALS).tolist(),
        "logps/rejected": [-2.0] * len(SIGNALS),
    }
    pair_lines(logs, "held_out_pairs.first.jsonl", 0, **columns)
    pair_lines(logs, "held_out_pairs.jsonl", 10, **columns)
    return logs


@pytest.mark.parametrize("runs", [[{}], [{}, {"preset": "paper"}, {"preset": "official"}], [{"margin_signal": "gap"}]])
def test_the_margins_of_one_run_or_several_are_drawn(
    tmp_path: Path, runs: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [str(rmipo_run(tmp_path / f"run{number}", **options)) for number, options in enumerate(runs)]
    picture = tmp_path / "new" / "margins.png"
    assert main(["--log-dir", *logs, "--picture", str(picture)]) == 0
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    # The style's first colours: one a run, and no other run's.
    shown = [bool((pixels == color).all(axis=-1).any()) for color in ((0, 114, 178), (213, 94, 0), (0, 158, 115))]
    assert shown == [number < len(runs) for number in range(3)]
    text = capsys.readouterr().out
    assert all((f"== {directory}" in text) == (len(logs) > 1) for directory in logs)
    assert text.count("Target margins") == len(logs)


def test_what_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, other = rmipo_run(tmp_path / "a"), rmipo_run(tmp_path / "b")
    assert main(["--log-dir", str(logs), str(other), "--model", "m"]) == 1
    assert "--model m: of which of the 2 runs?" in capsys.readouterr().err
    assert main(["--log-dir", str(logs), "--picture", str(tmp_path / "margins.xyz")]) == 1
    assert "margins.xyz: cannot be written" in capsys.readouterr().err
    diverged: dict[str, list[Any]] = {
        name: [None] * len(SIGNALS) for name in ("gamma", "dpmi", "rewards/margins", "logps/chosen", "logps/rejected")
    }
    pair_lines(logs, "held_out_pairs.jsonl", 10, **diverged)
    assert main(["--log-dir", str(logs), "--picture", str(tmp_path / "margins.png")]) == 1
    assert "held_out_pairs.jsonl has no pair with a finite margin; the run has diverged" in capsys.readouterr().err
    (logs / "held_out_pairs.jsonl").unlink()
    assert main(["--log-dir", str(logs), "--picture", str(tmp_path / "margins.png")]) == 1
    assert "held_out_pairs.jsonl is missing" in capsys.readouterr().err
    (other / "config.yaml").write_text("objective: simpo\n")
    assert main(["--log-dir", str(other), "--picture", str(tmp_path / "margins.png")]) == 1
    assert "is a run of objective simpo; only rmipo has margins to draw" in capsys.readouterr().err
