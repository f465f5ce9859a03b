"""What a rank holds of a long pair: counted, in the layouts that are asked for, and held against goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_context


@pytest.mark.parametrize("kind", ["all_gather", "a2a"])
def test_a_rank_holds_little_more_than_its_part(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt", "2500", "--response", "700", "--hidden-size", "64", "--limit-mib", "60"]
    arguments = [*sizes, "--cp-comm-type", kind, "--context-parallel-size", "1", "2", "--csv", str(tmp_path / "a.csv"), "--json"]
    assert bench_context.main([*arguments, "--check"]) == 0
    shown = json.loads(capsys.readouterr().out)
    alone, shared = shown["rows"]
    assert (alone["tokens"], shared["tokens_a_rank"]) == (6400, 3200)
    assert alone["peak_bytes"] > 1.8 * shared["peak_bytes"]
    assert all(goal["reached"] for goal in shown["goals"])
    assert bench_context.main([*arguments[:-1], "--json", "--limit-mib", "1000", "--check"]) == 1
