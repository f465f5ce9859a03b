"""The flags of tools/score_pairs.py."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rmipo.command import DONE
from megatron_rmipo.scoring import score_cli


def test_flags_of_every_section_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def score(config: Any, scoring: Any, _rendezvous: Any) -> list[str]:
        told.extend([config, scoring])
        return []

    monkeypatch.setattr(score_cli, "score", score)
    flags = {
        "--pairs": "data/pairs",
        "--load": "runs/a",
        "--make-vocab-size-divisible-by": "3",
        "--moe-router-dtype": "fp64",
        "--min-microbatches-per-stage": "5",
        "--expert-model-parallel-size": "7",
    }
    assert score_cli.main([*(word for pair in flags.items() for word in pair), "--debug"]) == DONE
    config, scoring = told
    assert (scoring.pairs, config.checkpoint.load) == (["data/pairs"], "runs/a")
    assert (config.model.make_vocab_size_divisible_by, config.experts.moe_router_dtype) == (3, "fp64")
    assert (config.data.min_microbatches_per_stage, config.parallel.expert_model_parallel_size) == (5, 7)
    assert config.logging.debug
