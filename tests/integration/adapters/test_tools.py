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


def ended(world_size: int, main: Callable[[list[str]], int], *arguments: Any) -> None:
    """Run a command that has to end well."""
    code, text = run_distributed(output_of, world_size, main, [str(word) for word in arguments])[0]
    assert code == 0, text


def refusals(folder: str) -> dict[str, str]:
    """What each wrong base of the run's checkpoint ends with."""
    where = Path(folder)
    base, run = where / "base", where / "run"
    faults: dict[str, list[Any]] = {
        "another form": ["--load", run, "--load-hf", MODEL],
        "another model": ["--load", run, "--load-hf", where / "other"],
        "whole": ["--load", base, "--pretrained-checkpoint", base],
        "alone": ["--pretrained-checkpoint", base],
    }
    return {name: _refusal(score_cli.main, ["--pairs", where / "pairs", *words]) for name, words in faults.items()}


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
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    settings: dict[str, Any] = {"lora_rank": 3, "lora_modules_to_save": "norm", "lr": 3e-2, "train_iters": 2, "objective": "dpo"}
    settings |= {"load_hf": None, "pretrained_checkpoint": base, "save_hf": merged}
    ended(2, trainer.main, *flags(tmp_path / "pairs", run, lr_warmup_iters=None, **settings), *TP_2)
    for cache, model in (("TP 2", ["--load", run, *TP_2]), ("PP 2", ["--load", run, *PP_2]), ("merged", ["--load-hf", merged])):
        ended(
            2 if "2" in cache else 1,
            score_cli.main,
            *("--pairs", tmp_path / "pairs", "--reference-cache", tmp_path / cache, *model),
        )
    ended(2, verify_cli.main, "--hf-model", merged, "--load", run, *TP_2)
    expected = _scores(tmp_path / "merged")
    base.rename(tmp_path / "moved")
    moved = ["--load", run, "--pretrained-checkpoint", tmp_path / "moved"]
    ended(1, score_cli.main, "--pairs", tmp_path / "pairs", "--reference-cache", tmp_path / "moved base", *moved)
    (tmp_path / "moved").rename(base)
    for cache in ("TP 2", "PP 2", "moved base"):
        np.testing.assert_allclose(_scores(tmp_path / cache), expected, rtol=1e-5)
    found = run_distributed(refusals, 1, str(tmp_path))[0]
    assert "in another form" in found["another form"]
    assert "holds an adapter of another model" in found["another model"]
    assert "holds a whole model" in found["whole"]
    assert "Name a whole model with --load" in found["alone"]
    assert not any("Traceback" in text for text in found.values())


def _scores(cache: Path) -> Any:
    (path,) = cache.rglob("scores.npy")
    return np.load(path)
