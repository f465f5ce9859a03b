"""Several held-out sets, the best checkpoint and early stopping, through the trainer's command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.errors import CheckpointError
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.test_training import flags, losses, output_of, records, run, weights


def arguments(folder: Path, save: Path, **changes: Any) -> list[str]:
    """A run whose held-out likelihood falls from step 2 on, and whose accuracy on the set ``odd`` rises no more after that."""
    settings: dict[str, Any] = {
        **{"split": None, "valid_data_path": folder / "held_out", "train_iters": 14, "eval_interval": 2, "lr": 3e-2},
        **{"save_interval": 3, "keep_last": 1, "keep_best": "odd:rewards/accuracies", "early_stop": "nll/chosen:3"},
    }
    settings["save_hf_from"] = "best" if "save_hf" in changes else None
    return [*flags(folder / "train", save, **settings | changes), "--eval-data", f"odd={folder / 'odd'}"]


def steps_kept(save: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*") if path.name[5:].isdigit())


def evaluations(save: Path, kind: str) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(save, kind)}


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_stops_early_and_exports_its_best_and_so_does_one_that_was_interrupted(tmp_path: Path) -> None:
    for name, first in {"train": 0, "held_out": 40, "odd": 30}.items():
        write_pairs(tmp_path / name, first=first)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = run_distributed(output_of, 1, run, arguments(tmp_path, whole, save_hf=tmp_path / "hf"))[0]
    assert code == 0, said
    assert "data: 48 pairs to train on, 8 held out; 18 held out as odd" in said
    assert said.count("early stop: nll/chosen was best at step 2 (") == 1
    assert "the export is from step 2, the best by odd:rewards/accuracies" in said
    assert list(evaluations(whole, "eval")) == list(evaluations(whole, "eval/odd")) == [0, 2, 4, 6, 8]
    assert list(losses(whole)) == list(range(1, 9))
    # The newest, and the best, which no --save-interval asked for.
    assert steps_kept(whole) == [2, 8]
    best = json.loads((whole / "logs" / "best.json").read_text())
    assert (best["metric"], best["step"], best["checkpoint"]) == ("odd:rewards/accuracies", 2, str(whole / "iter_0000002"))
    assert best["value"] == records(whole, "eval/odd")[1]["rewards/accuracies"]
    facts = json.loads((whole / "logs" / "run.json").read_text())
    assert facts["early_stop"] in said
    assert (facts["data"]["held_out"]["evaluated"], facts["data"]["eval_data"]["odd"]["evaluated"]) == (8, 18)
    pairs = (whole / "logs" / "held_out_pairs.odd.first.jsonl").read_text().splitlines()
    assert (len(pairs), json.loads(pairs[0])["step"]) == (18, 0)
    convert_megatron_to_hf(whole, tmp_path / "converted", iteration="best")
    exported, converted = weights(tmp_path / "hf"), weights(tmp_path / "converted")
    assert all(torch.equal(exported[name], converted[name]) for name in exported)

    # Stopped where the checkpoint was written before the evaluation that counts; two ranks agree with one.
    assert run_distributed(run, 2, arguments(tmp_path, parts, load=parts, exit_interval=6)) == [75, 75]
    assert steps_kept(parts) == [2, 6]
    assert run_distributed(run, 2, arguments(tmp_path, parts, load=parts)) == [0, 0]
    # That which the run went on from stays, too, while its tokenizer is used.
    assert steps_kept(parts) == [2, 6, 8]
    assert evaluations(parts, "eval/odd") == pytest.approx(evaluations(whole, "eval/odd"), rel=1e-4)
    found = json.loads((parts / "logs" / "best.json").read_text())
    assert found == {**best, "checkpoint": str(parts / "iter_0000002"), "value": pytest.approx(best["value"])}
    # What is over stays so.
    code, said = run_distributed(output_of, 1, run, arguments(tmp_path, parts, load=parts, save_hf=tmp_path / "again"))[0]
    assert (code, list(losses(parts))) == (0, list(range(1, 9)))
    assert "early stop: nll/chosen was best at step 2 (" in said
    again = weights(tmp_path / "again")
    assert all(torch.allclose(exported[name], again[name], atol=1e-4) for name in exported)


@pytest.mark.dist
def test_further_sets_stand_alone_and_a_metric_that_they_lack_ends_the_run_at_its_start(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train")
    given = flags(tmp_path / "train", tmp_path / "run", split=None, eval_interval=3, early_stop="a:accuracy:2", objective="simpo")
    code, said = run_distributed(output_of, 1, run, [*given, "--eval-data", f"a={tmp_path / 'train'}"])[0]
    assert code == 1
    assert "--early-stop a:accuracy: evaluations have no metric accuracy. They have: " in said
    assert "rewards/accuracies" in said
    assert not records(tmp_path / "run", "train")
    with pytest.raises(CheckpointError, match=r"best_checkpointed_iteration.txt is missing or says nothing"):
        convert_megatron_to_hf(tmp_path / "run", tmp_path / "hf", iteration="best")
