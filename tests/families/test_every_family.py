"""Every kind of model at every kind of layout: read, computed, trained and written as transformers has it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.hf.weights import export_hf
from megatron_rmipo.checkpoint.verify import compare_with_transformers
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.hybrid import HybridModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.checkpoint.models import KINDS, SPARSE_KINDS, write_hf_model
from tests.harness import run_distributed
from tests.integration.problem import VOCAB, DenseProblem, collection, make_pairs
from tests.integration.test_invariance import check
from tests.integration.worlds import Case, ReferenceScores, build_state, loss_and_gradients, run_at_layouts

NUM_PAIRS = 14
TEXT_LENGTHS = (1, 23, 60)
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{"share_prompts": False, "tokens_per_microbatch": 150}],
    2: [
        {"tp": 2, "sequence_parallel": True, "tokens_per_microbatch": 200},
        {"pp": 2, "recompute": "full", "tokens_per_microbatch": 120},
    ],
}
# Those of kinds with experts besides.
SPARSE_LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [],
    2: [{"ep": 2, "tokens_per_microbatch": 150}],
    4: [
        {"ep": 2, "tokens_per_microbatch": 150},
        {"ep": 2, "pp": 2, "tokens_per_microbatch": 120, "recompute": "full"},
        {"ep": 2, "tp": 2, "etp": 1, "sequence_parallel": True, "tokens_per_microbatch": 200},
        {"ep": 2, "tp": 2, "etp": 2, "sequence_parallel": True, "tokens_per_microbatch": 200},
    ],
}
# Of kinds whose attention is not the plain one, over ranks that share rows: sinks and windows, caps, windows, latents.
CONTEXT_KINDS = ("gpt_oss", "gemma2", "gemma3", "deepseek_v3")
CONTEXT_LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{"cp": 2, "tokens_per_microbatch": 200}, {"cp": 2, "cp_comm_type": "a2a", "recompute": "full"}],
}
# Of HybridModel, where there is one: kinds that between them have every part that it could miss.
HYBRID_KINDS = ("gemma3", "olmo2_tied", "smollm3", "granite", "qwen2_moe", "gpt_oss")
HYBRID_LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"model_class": "hybrid", "tp": 2, "sequence_parallel": True, "tokens_per_microbatch": 200},
        {"model_class": "hybrid", "pp": 2, "recompute": "full", "tokens_per_microbatch": 120},
    ],
}


def read_train_and_write(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any] | None:
    """Logits against transformers, loss and gradients of a step, and the model written again."""
    hf = Path(folder) / case.model
    state = build_state(case, hf, groups)
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(VOCAB, (length,), generator=generator) for length in TEXT_LENGTHS]
    # Logits of whole rows, which no rank has where they share them.
    agreement = None if case.cp > 1 else compare_with_transformers(state.policy, hf, texts, groups, torch.float32)
    out = Path(folder) / f"{case.name} written"
    export_hf(state.policy, state.policy.architecture, hf, out, dtype=None, groups=groups, max_shard_bytes=60000)
    result = loss_and_gradients(case, str(hf), pairs, ReferenceScores(str(hf), groups))
    return None if result is None else {**result, "agreement": agreement}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def generated(directory: Path) -> list[int]:
    """The tokens that a model in transformers goes on with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.arange(3, 12)[None]
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    return [int(token) for token in tokens[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@functools.cache
def answer(folder: Path, kind: str) -> Any:
    """A model of a kind, written to ``folder``: the loss of a step by transformers, its gradients and metrics."""
    hf = write_hf_model(folder / kind, kind)
    return DenseProblem(hf, hf, make_pairs(NUM_PAIRS)).answer(build_objective("rmipo", {}))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", sorted(SPARSE_LAYOUTS))
def test_every_kind_agrees_with_transformers(world_size: int, folder: Path) -> None:
    pairs = make_pairs(NUM_PAIRS)
    layouts = [(kind, layout) for layout in LAYOUTS.get(world_size, []) for kind in KINDS]
    layouts += [(kind, layout) for layout in SPARSE_LAYOUTS[world_size] for kind in SPARSE_KINDS]
    layouts += [(kind, layout) for layout in CONTEXT_LAYOUTS.get(world_size, []) for kind in CONTEXT_KINDS]
    if HybridModel is not None:
        layouts += [(kind, layout) for layout in HYBRID_LAYOUTS.get(world_size, []) for kind in HYBRID_KINDS]
    cases = [Case(f"{kind} {world_size}.{number}", model=kind, **layout) for number, (kind, layout) in enumerate(layouts)]
    answers = {kind: answer(folder, kind) for kind in {case.model for case in cases}}
    run = functools.partial(run_at_layouts, read_train_and_write)
    results = run_distributed(run, world_size, cases, str(folder), collection(pairs), seconds=900)[0]
    failures = {}
    for case, result in zip(cases, results, strict=True):
        try:
            assert case.cp > 1 or result["agreement"].max_difference < 1e-4, result["agreement"]
            check(case, result, answers[case.model])
            expected, written = tensors(folder / case.model), tensors(folder / f"{case.name} written")
            assert written.keys() == expected.keys()
            assert [name for name, tensor in expected.items() if not torch.equal(tensor, written[name])] == []
            if world_size == 1:
                assert generated(folder / f"{case.name} written") == generated(folder / case.model)
        except AssertionError as error:
            failures[case.name] = str(error)
    assert failures == {}
