"""Megatron-Bridge's ``finetune`` on preference pairs: the package itself where it is there, a stand-in of its loop everywhere."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.plugin.adapters.reference_cache import _find
from tests.harness import run_distributed
from tests.integration.test_invariance import check
from tests.integration.worlds import Case
from tests.plugin.adapters import bridge_runs, stand_in_runs
from tests.plugin.adapters.bridge_on_cpu import bridge_is_installed
from tests.plugin.adapters.first_step import OBJECTIVES, write_problem, write_scores

LAYOUTS = {
    1: [Case("TP 1")],
    2: [Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2), Case("DP 2")],
}
with_the_package = pytest.mark.skipif(
    not bridge_is_installed(), reason="needs Megatron-Bridge itself (0.6.2, Python 3.12), which is not installed"
)


@with_the_package
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_the_package_gives_the_dense_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    answers = write_problem(tmp_path)
    cases = [dataclasses.replace(case, objective=name) for case in LAYOUTS[world_size] for name in OBJECTIVES]
    results = run_distributed(bridge_runs.first_steps, world_size, cases, str(tmp_path))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers[case.objective])


@with_the_package
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("rank", [None, 4], ids=["all weights", "LoRA"])
def test_the_package_goes_on_from_its_checkpoint_to_the_bit(rank: int | None, tmp_path: Path) -> None:
    write_problem(tmp_path)
    found = run_distributed(bridge_runs.goes_on, 1, str(tmp_path), rank)[0]
    (whole, later), states = found["losses"], found["states"]
    assert (len(whole), later) == (4, whole[2:])
    assert states[0] == states[1]
    assert states[0]["num_batches"] == 4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the problem lies, and the dense answers."""
    folder = tmp_path_factory.mktemp("bridge")
    return folder, write_problem(folder)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_the_loop_gives_the_dense_loss_and_gradients(world_size: int, written: tuple[Path, dict[str, Any]]) -> None:
    folder, answers = written
    cases = [dataclasses.replace(case, objective=name) for case in LAYOUTS[world_size] for name in OBJECTIVES]
    results = run_distributed(stand_in_runs.first_steps, world_size, cases, str(folder))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers[case.objective])


@pytest.mark.dist
def test_a_run_goes_on_with_its_state_and_evaluates_the_same_pairs(written: tuple[Path, dict[str, Any]]) -> None:
    found = run_distributed(stand_in_runs.goes_on, 1, str(written[0]))[0]
    whole, later = found["reports"].values()
    assert found["state"]["whole"] == found["state"]["from the middle"]
    assert found["state"]["whole"]["num_batches"] == 4
    assert [key for key in later if isinstance(key, int)] == [3, 4]
    for number in (3, 4):
        assert later[number].keys() == whole[number].keys()
        assert all(torch.equal(later[number][name], value) for name, value in whole[number].items())
    # Weights stay, and so does what depends on them alone.
    evaluations = [[report["rewards/margins"].item() for report in whole["valid", number]] for number in (1, 2, 3, 4)]
    assert evaluations == [evaluations[0]] * 4
    assert len(set(evaluations[0])) == 2


@pytest.mark.dist
def test_the_reference_of_a_model_with_adapters_is_itself(written: tuple[Path, dict[str, Any]]) -> None:
    for losses in run_distributed(stand_in_runs.adapted, 2, str(written[0])):
        # B is zero.
        assert losses == {"dpo": pytest.approx(math.log(2), abs=1e-6), "kto": losses["kto"], "epsilon_dpo": losses["dpo"]}
        assert losses["kto"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.dist
def test_what_does_not_go_together_is_refused_by_name(written: tuple[Path, dict[str, Any]]) -> None:
    said = run_distributed(stand_in_runs.refusals, 1, str(written[0]))[0]
    expected = {
        "mean of means": ["model.calculate_per_token_loss False", "ddp.average_in_collective", "train.rampup_batch_size"],
        "interleaved": ["model.virtual_pipeline_model_parallel_size 2", "dist.use_megatron_fsdp"],
        "a reference in memory": ["objective epsilon_dpo keeps its reference in memory"],
        "state lost": ["checkpoint.async_save", "checkpoint.non_persistent_save_interval"],
        "no callback": ["finetune(config, step, callbacks=[step])"],
        "too few held-out pairs": ["validation.eval_iters 5 x 6 pairs", "has 24. Give validation.eval_iters 4"],
        "no reference": ["holds no log-probs of", "tools/score_pairs.py --pairs"],
    }
    assert said.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(part in said[name] for part in parts), said[name]


def test_scores_of_several_references_are_asked_for(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    prefix = tmp_path / "pairs"
    directory, key = _find(str(prefix), "matched", "dpo", None)
    assert key.reference == "reference"
    other = write_scores(prefix, "matched", torch.zeros(24, 2), reference="another")
    with pytest.raises(ConfigError, match="under several references") as refused:
        _find(str(prefix), "matched", "dpo", None)
    assert all(str(path) in str(refused.value) for path in (directory, other))
    (other / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"progress\.json: not readable"):
        _find(str(prefix), "matched", "dpo", None)
