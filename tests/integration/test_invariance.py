"""The loss does not depend on how the batch is cut: 24 pairs at every layout against transformers in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.objectives.registry import build_objective
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, run_cases

OFFICIAL = {"preset": "official"}
# Name -> what makes it differ from the Llama of the other cases.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    # Without biases in the MLP: the two are apart.
    "biased attention": {"attention_bias": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    # With a window in the second stage's layers and the last of the first, shorter than most prompts and responses.
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 20},
    # All layers dense; queries, keys and values out of latents.
    "deepseek": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "rms_norm_eps": 1e-6,
    },
}
WORLDS = {
    1: [
        Case("one pair a pack", tokens_per_microbatch=48),
        Case("all in one pack"),
        Case("prompts not shared", share_prompts=False),
        Case("few packs", tokens_per_microbatch=200),
        Case("full recomputation", recompute="full", tokens_per_microbatch=200),
        Case("recomputation of attention", recompute="selective", tokens_per_microbatch=200),
        Case("official preset", options=OFFICIAL, tokens_per_microbatch=120),
        Case("simpo", objective="simpo", tokens_per_microbatch=120),
        Case("sft", objective="sft", tokens_per_microbatch=120),
        Case("one pair a pack, tied", model="tied", tokens_per_microbatch=48),
        Case("recomputation of attention, tied", model="tied", recompute="selective", tokens_per_microbatch=200),
        Case("prompts not shared, mistral", model="mistral", share_prompts=False, tokens_per_microbatch=200),
        Case("recomputation of attention, deepseek", model="deepseek", recompute="selective", tokens_per_microbatch=200),
    ],
    2: [
        Case("TP 2", tp=2, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel, recomputation", tp=2, sequence_parallel=True, recompute="full"),
        Case("TP 2, prompts not shared", tp=2, share_prompts=False, tokens_per_microbatch=120),
        Case("TP 2, official preset", tp=2, options=OFFICIAL),
        Case("PP 2", pp=2, tokens_per_microbatch=120),
        Case("PP 2, one pair a pack", pp=2, tokens_per_microbatch=48),
        Case("PP 2, recomputation", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("DP 2", tokens_per_microbatch=120),
        Case("DP 2, one pair a pack", tokens_per_microbatch=48),
        Case("DP 2, overlapped reduction", overlap=True, tokens_per_microbatch=120),
        Case("DP 2, sft", objective="sft", tokens_per_microbatch=120),
        Case("TP 2, tied", model="tied", tp=2, tokens_per_microbatch=200),
        Case("PP 2, tied", model="tied", pp=2, tokens_per_microbatch=120),
        Case("TP 2, biased attention", model="biased attention", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("TP 2, qwen3", model="qwen3", tp=2, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel, qwen3", model="qwen3", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, qwen3", model="qwen3", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("TP 2, qwen2", model="qwen2", tp=2, tokens_per_microbatch=200),
        Case("PP 2, qwen2", model="qwen2", pp=2, tokens_per_microbatch=120),
        Case("TP 2, mistral", model="mistral", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, mistral", model="mistral", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("TP 2, deepseek", model="deepseek", tp=2, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel, deepseek", model="deepseek", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, deepseek", model="deepseek", pp=2, recompute="full", tokens_per_microbatch=120),
    ],
    4: [
        Case("TP 2 x PP 2", tp=2, pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, sequence parallel", tp=2, pp=2, sequence_parallel=True, tokens_per_microbatch=120),
        Case("TP 2 x DP 2", tp=2, tokens_per_microbatch=120),
        Case("PP 2 x DP 2", pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, tied", model="tied", tp=2, pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, biased attention", model="biased attention", tp=2, pp=2, tokens_per_microbatch=120),
    ],
}


def check(case: Case, result: dict[str, Any], answers: dict[str, Any]) -> None:
    loss, gradients, metrics = answers[_question(case)]
    assert result["loss"] == pytest.approx(loss, rel=1e-5), case.name
    for name, values in metrics.items():
        found = result["metrics"][name]
        if name == "rewards/accuracies":
            # Which of two equal rewards is larger is a matter of rounding.
            values, found = (torch.where(metrics["rewards/margins"].abs() < 1e-4, 0.0, column) for column in (values, found))
        approximately = pytest.approx(values.tolist(), rel=1e-4, abs=1e-4, nan_ok=True)
        assert found.tolist() == approximately, (case.name, name)
    assert result["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (result["gradients"][name].double() - gradient).norm() / gradient.norm()
        assert error < 1e-4, (case.name, name, float(error))


def _question(case: Case) -> str:
    return f"{case.model} {case.objective} {case.options}"


def run_and_check(cases: list[Case], world_size: int, pairs: list[TokenizedPair], folder: Path) -> list[dict[str, Any]]:
    """Run cases on so many ranks and compare each with the dense answer; what they gave."""
    problems, answers = {}, {}
    for name in {case.model: None for case in cases}:
        hf_dir = make_hf_model(folder / name / "model", **MODELS[name])
        reference_dir = make_hf_model(folder / name / "reference", seed=1, **MODELS[name])
        problems[name] = DenseProblem(hf_dir, reference_dir, pairs)
    for case in cases:
        if _question(case) not in answers:
            answers[_question(case)] = problems[case.model].answer(build_objective(case.objective, case.options))
    results = run_distributed(run_cases, world_size, cases, str(folder), collection(pairs))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers)
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_same_loss_and_gradients_however_the_batch_is_cut(world_size: int, tmp_path: Path) -> None:
    cases = WORLDS[world_size]
    results = run_and_check(cases, world_size, make_pairs(), tmp_path)
    packs = {case.name: result["packs"] for case, result in zip(cases, results, strict=True)}
    if world_size == 1:
        assert packs["one pair a pack"] > packs["few packs"] > packs["all in one pack"] == 1, packs
