from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.runs import find_runs, gaps_of
from tests.reports.pictures.made_up import FIRST, LAST, write_lines, write_run


def test_runs_are_found_by_what_they_saved_to_and_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "x/grid/a"), write_run(tmp_path / "y/grid/a")
    write_run(tmp_path / "x/grid/b=1")
    words = [str(first), f"{second}/logs", f"mine={second}/logs/metrics.jsonl", f"{tmp_path}/x/grid/b=1"]
    assert [run.label for run in find_runs(words)] == ["x/grid/a", "y/grid/a", "mine", "x/grid/b=1"]
    assert [run.label for run in find_runs([f"{tmp_path}/x/grid"])] == ["a", "b=1"]
    with pytest.raises(ConfigError, match=r"--runs me=.*2 runs lie there"):
        find_runs([f"me={tmp_path}/x/grid"])
    with pytest.raises(ConfigError, match="two runs are called me"):
        find_runs([f"me={first}", f"me={second}"])
    for word in (str(tmp_path / "absent"), str(first / "logs/config.yaml")):
        with pytest.raises(ConfigError, match=r"no metrics\.jsonl in it"):
            find_runs([word])


def test_what_is_read_of_a_run(tmp_path: Path) -> None:
    (run,) = find_runs([str(write_run(tmp_path / "a", "--beta", "1.5"))])
    assert (len(run.steps), len(run.evaluations), run.config["beta"]) == (5, 2, 1.5)
    assert gaps_of(run.first_pairs) == pytest.approx(FIRST)
    assert gaps_of(run.last_pairs) == pytest.approx(LAST)
    for place in ("logs/evaluation/b.json", "evaluation/a.json"):
        (run.log_dir.parent / place).parent.mkdir()
        (run.log_dir.parent / place).touch()
    assert {path.name for path in run.evaluation_files} == {"a.json", "b.json"}
    assert np.isnan(gaps_of([{"logps/chosen": 1.0, "logps/rejected": None}, {}])).all()
    # Before its second evaluation a run has nothing to compare with; before its first, nothing at all.
    write_lines(run.log_dir / "metrics.jsonl", [{"kind": "eval", "step": 0}])
    (run,) = find_runs([str(run.log_dir)])
    assert run.first_pairs == []
    with pytest.raises(ConfigError, match=r"held_out_pairs\.jsonl is missing"):
        _ = run.last_pairs
