"""Checkpoints that hold an adapter alone, in the tools: they compute what the merged model computes, on the right base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.checkpoint import verify_cli
from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron
from megatron_rmipo.runtime.groups import shutdown_runtime
from megatron_rmipo.scoring import score_cli
from megatron_rmipo.training import main as trainer
from tests.harness import run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_reference import other_model
from tests.integration.test_training import flags, output_of

TP_2, PP_2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def scored(where: Path, cache: str, *arguments: Any) -> None:
    words = ["--pairs", where / "pairs", "--reference-cache", where / cache, *arguments]
    assert score_cli.main([str(word) for word in words]) == 0, cache


def score_at_layouts(folder: str) -> dict[str, Any]:
    """A run at TP 2 on a Megatron checkpoint; then its checkpoint, the merged model and its adapter are scored and refused."""
    where, found = Path(folder), {}
    base, run, merged = where / "base", where / "run", where / "merged"
    settings: dict[str, Any] = {"lora_rank": 3, "lora_modules_to_save": "norm", "lr": 3e-2, "train_iters": 2, "objective": "dpo"}
    settings |= {"load_hf": None, "pretrained_checkpoint": base, "save_hf": merged, "save_adapter": where / "adapter"}
    arguments = [*flags(where / "pairs", run, lr_warmup_iters=None, **settings), *TP_2]
    code, text = output_of(trainer.main, arguments)
    assert code == 0, text
    scored(where, "TP 2", "--load", run, *TP_2)
    scored(where, "PP 2", "--load", run, *PP_2)
    scored(where, "merged", "--load-hf", merged, *TP_2)
    scored(where, "frozen", "--load-hf", MODEL, *TP_2)
    found["verified"] = verify_cli.main(["--hf-model", str(merged), "--load", str(run), *TP_2])
    other = where / "other"
    faults: dict[str, list[Any]] = {
        "another form": ["--load", run, "--load-hf", MODEL],
        "another model": ["--load", run, "--load-hf", other],
        "whole": ["--load", base, "--pretrained-checkpoint", base],
        "alone": ["--pretrained-checkpoint", base],
    }
    for name, words in faults.items():
        found[name] = _refusal(score_cli.main, ["--pairs", where / "pairs", *words, *TP_2])
    return found


def _refusal(main: Callable[[list[str]], int], words: list[Any]) -> str:
    code, text = output_of(main, [str(word) for word in words])
    shutdown_runtime()
    assert code == 1, text
    return text


@pytest.mark.dist
@pytest.mark.slow
def test_tools_compute_with_an_adapter_on_its_base(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    other_model(tmp_path / "other")
    convert_hf_to_megatron(MODEL, tmp_path / "base")
    found = run_distributed(score_at_layouts, 2, str(tmp_path))[0]
    merged, frozen = (_scores(tmp_path / name) for name in ("merged", "frozen"))
    assert np.abs(merged - frozen).max() > 1e-2
    for name in ("TP 2", "PP 2"):
        np.testing.assert_allclose(_scores(tmp_path / name), merged, rtol=1e-5)
    assert found["verified"] == 0
    assert "in another form" in found["another form"]
    assert "holds an adapter of another model" in found["another model"]
    assert "holds a whole model" in found["whole"]
    assert "Name a whole model with --load" in found["alone"]
    assert not any("Traceback" in text for text in found.values() if isinstance(text, str))


def _scores(cache: Path) -> Any:
    (path,) = cache.rglob("scores.npy")
    return np.load(path)
