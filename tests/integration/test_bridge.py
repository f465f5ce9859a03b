"""``--bridge megatron-bridge`` from the command line, on a family that is not known here, with a stand-in for the package."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.command import STOPPED
from megatron_rmipo.scoring.score_cli import main as score_pairs
from tests.checkpoint.stand_in_bridge import install_stand_in
from tests.harness import run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_training import flags, losses, output_of, run, weights

NAME = "OuterForCausalLM"


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """A model that is a Llama, under a name that is not known here."""
    directory = Path(shutil.copytree(MODEL, tmp_path / "outer"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [NAME]}))
    return directory


def run_bridged(arguments: list[str]) -> int:
    install_stand_in()
    return run([*arguments, "--bridge", "megatron-bridge"])


def score_bridged(arguments: list[str]) -> int:
    install_stand_in()
    return score_pairs([*arguments, "--bridge", "megatron-bridge"])


def scores_in(folder: Path) -> np.ndarray:
    (path,) = folder.rglob("scores.npy")
    return np.load(path)


@pytest.mark.slow
@pytest.mark.dist
def test_an_unknown_family_trains_resumes_and_exports(outer: Path, tmp_path: Path) -> None:
    prefix, save, exported = write_pairs(tmp_path / "data" / "pairs"), tmp_path / "run", tmp_path / "exported"
    common: dict[str, Any] = {
        "objective": "dpo",
        "train_iters": 2,
        "lr_warmup_iters": None,
        "reference_cache": tmp_path / "scores",
    }
    bridged = {**common, "load_hf": outer, "use_distributed_optimizer": True}
    first = flags(prefix, save, exit_interval=1, tensor_model_parallel_size=2, sequence_parallel=True, **bridged)
    code, output = run_distributed(output_of, 2, run_bridged, first)[0]
    assert code == STOPPED, output
    num_parameters = sum(tensor.numel() for tensor in weights(MODEL).values())
    assert f"model: about {num_parameters:,} parameters (megatron-bridge), from {outer}" in output
    assert losses(save)[1] == pytest.approx(math.log(2), abs=1e-6)
    # At another layout, its optimizer's state over two ranks, to the end.
    code, output = run_distributed(output_of, 2, run_bridged, flags(prefix, save, load=save, save_hf=exported, **bridged))[0]
    assert code == 0, output
    # The same run by the family that it is in truth.
    known = tmp_path / "known"
    code, output = run_distributed(output_of, 1, run, flags(prefix, known, save_hf=tmp_path / "known-hf", **common))[0]
    assert code == 0, output
    assert losses(save)[2] == pytest.approx(losses(known)[2], rel=1e-5)
    written, expected = weights(exported), weights(tmp_path / "known-hf")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam makes of gradients near zero steps of either sign; a step moves the weights by hundredths of their norm.
        assert (written[name] - tensor).norm() < 2e-4 * tensor.norm(), name
    assert json.loads((exported / "config.json").read_text())["architectures"] == [NAME]
    # Its checkpoints are scored, and not converted by rules of a family that it has none of.
    pairs = ["--pairs", str(prefix), "--tokens-per-microbatch", "700", "--reference-cache"]
    scored = ["--load", str(save), "--load-hf", str(outer), *pairs, str(tmp_path / "a")]
    code, output = run_distributed(output_of, 1, score_bridged, scored)[0]
    assert code == 0, output
    scored = ["--load-hf", str(tmp_path / "known-hf"), *pairs, str(tmp_path / "b")]
    code, output = run_distributed(output_of, 1, score_pairs, scored)[0]
    assert code == 0, output
    np.testing.assert_allclose(scores_in(tmp_path / "a"), scores_in(tmp_path / "b"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.dist
def test_weights_that_do_not_move_come_back_bit_for_bit(outer: Path, tmp_path: Path) -> None:
    prefix, exported = write_pairs(tmp_path / "data" / "pairs"), tmp_path / "exported"
    # The objective keeps its reference in memory: two models of the bridge at once.
    still = {"lr": 1e-30, "weight_decay": 0, "train_iters": 2, "lr_warmup_iters": None, "objective": "epsilon_dpo"}
    arguments = flags(prefix, tmp_path / "run", load_hf=outer, save_hf=exported, **still)
    code, output = run_distributed(output_of, 2, run_bridged, arguments)[0]
    assert code == 0, output
    written, expected = weights(exported), weights(MODEL)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
