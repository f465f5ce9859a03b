"""HybridModel computes what GPTModel does, and a checkpoint of one goes on as the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.command import STOPPED
from megatron_rmipo.model.hybrid import HybridModel
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.problem import collection, make_hf_model, make_pairs
from tests.integration.sparse import KINDS
from tests.integration.test_invariance import MODELS as DENSE
from tests.integration.test_training import flags, losses, run, weights
from tests.integration.worlds import Case, run_cases

pytestmark = pytest.mark.skipif(HybridModel is None, reason="this megatron-core has no HybridModel")

MODELS = {**DENSE, "mixtral": KINDS["mixtral"][1]}
WORLDS = {
    1: [
        Case("few packs", tokens_per_microbatch=200),
        Case("full recomputation, biased attention", model="biased attention", recompute="full", tokens_per_microbatch=200),
        Case("recomputation of attention, tied", model="tied", recompute="selective", tokens_per_microbatch=200),
        Case("experts, full recomputation", model="mixtral", recompute="full", tokens_per_microbatch=120),
    ],
    2: [
        Case("TP 2, sequence parallel", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("CP 2", cp=2, tokens_per_microbatch=120),
        Case("CP 2, EP 2", model="mixtral", cp=2, ep=2, cp_comm_type="a2a", tokens_per_microbatch=120),
        Case("PP 2, tied", model="tied", pp=2, tokens_per_microbatch=120),
        Case(
            "PP 2, recomputation, biased attention", model="biased attention", pp=2, recompute="full", tokens_per_microbatch=120
        ),
        Case("TP 2, sequence parallel, experts", model="mixtral", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2 x VPP 2", model="mixtral", pp=2, split={"num_virtual_stages_per_pipeline_rank": 2}, tokens_per_microbatch=120),
        Case("PP 2, one layer first", model="tied", pp=2, split={"decoder_first_pipeline_num_layers": 1}),
        Case("PP 2, experts", model="mixtral", pp=2, tokens_per_microbatch=120),
    ],
}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_a_hybrid_model_gives_the_same_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    """As GPTModel's, which other tests compare with transformers."""
    gpt = WORLDS[world_size]
    for model in {case.model: None for case in gpt}:
        make_hf_model(tmp_path / model / "model", **MODELS[model])
    hybrid = [dataclasses.replace(case, model_class="hybrid") for case in gpt]
    results = run_distributed(run_cases, world_size, [*gpt, *hybrid], str(tmp_path), collection(make_pairs()))[0]
    for case, first, second in zip(gpt, results[: len(gpt)], results[len(gpt) :], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6), case.name
        assert second["gradients"].keys() == first["gradients"].keys()
        for name, gradient in first["gradients"].items():
            # Experts that nothing goes through have none.
            error = (second["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-20)
            assert error < 1e-6, (case.name, name, float(error))


@pytest.mark.dist
def test_a_checkpoint_of_one_class_goes_on_as_the_other(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "data" / "pairs")
    whole, parts, exported = tmp_path / "whole", tmp_path / "parts", tmp_path / "exported"
    distributed = {"use_distributed_optimizer": True}
    assert run_distributed(run, 1, flags(prefix, whole, **distributed)) == [0]
    first = flags(prefix, parts, exit_interval=2, tensor_model_parallel_size=2, model_class="hybrid", **distributed)
    assert run_distributed(run, 2, first) == [STOPPED, STOPPED]
    assert run_distributed(run, 1, flags(prefix, parts, load=parts, exit_interval=4, **distributed)) == [STOPPED]
    hybrid = {"pipeline_model_parallel_size": 2, "model_class": "hybrid"}
    last = flags(prefix, parts, load=parts, save_hf=exported, **hybrid, **distributed)
    assert run_distributed(run, 2, last) == [0, 0]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    # What was exported is what its checkpoint is converted to.
    convert_megatron_to_hf(parts, tmp_path / "offline")
    expected, offline = weights(exported), weights(tmp_path / "offline")
    assert offline.keys() == expected.keys()
    assert all(torch.equal(offline[name], tensor) for name, tensor in expected.items())
