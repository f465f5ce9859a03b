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
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    # Three layers of four with a window.
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "glm4": {"model_type": "glm4", "head_dim": 20, "rms_norm_eps": 1e-4},
    "gemma2": {
        **{"model_type": "gemma2", "head_dim": 20, "sliding_window": 5, "query_pre_attn_scalar": 30},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "head_dim": 20, "sliding_window": 5},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma": {"model_type": "gemma", "head_dim": 20},
    # Twice as long as its original context at most.
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        "head_dim": 20,
    },
    # With a window in the second stage's layers and the last of the first, shorter than most prompts and responses.
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    # Windows in the layers without rotary embeddings, one of each stage's.
    "smollm3": {
        **{"model_type": "smollm3", "pad_token_id": None, "no_rope_layer_interval": 2},
        **{"use_sliding_window": True, "sliding_window": 6},
    },
    # Half of a head is turned, and what is turned is larger.
    "phi3": {
        **{"model_type": "phi3", "pad_token_id": None, "original_max_position_embeddings": 64},
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            **{"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]},
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 20},
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
    ],
    2: [
        Case("TP 2, sequence parallel, phi3", model="phi3", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, smollm3", model="smollm3", pp=2, tokens_per_microbatch=120),
        Case("TP 2, yarn", model="yarn", tp=2, tokens_per_microbatch=200),
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
        Case("TP 2, olmo2", model="olmo2", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, olmo3", model="olmo3", pp=2, tokens_per_microbatch=120),
        Case("PP 2, gemma", model="gemma", pp=2, tokens_per_microbatch=120),
        Case("TP 2, glm4", model="glm4", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("TP 2, gemma2", model="gemma2", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, gemma2", model="gemma2", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("TP 2, gemma3", model="gemma3", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("TP 2, qwen2", model="qwen2", tp=2, tokens_per_microbatch=200),
        Case("PP 2, qwen2", model="qwen2", pp=2, tokens_per_microbatch=120),
        Case("TP 2, mistral", model="mistral", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("PP 2, mistral", model="mistral", pp=2, recompute="full", tokens_per_microbatch=120),
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
