"""The loss does not depend on how the batch is cut: 24 pairs at every layout against transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.objectives.registry import build_objective
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.sparse import KINDS
from tests.integration.worlds import Case, run_cases

OFFICIAL = {"preset": "official"}
# Name -> what makes it differ from the Llama of the other cases.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    # Without biases in the MLP: the two are apart.
    "biased attention": {"attention_bias": True},
    "mixtral": KINDS["mixtral"][1],
    "eight layers": {"num_hidden_layers": 8, "tie_word_embeddings": True},
    "seven layers": {"num_hidden_layers": 7},
    # Which tensor-parallel ranks share; queries and keys are normed.
    "one key": {"model_type": "qwen3", "num_key_value_heads": 1, "attention_bias": True, "head_dim": 12},
}
SPARSE: dict[str, Any] = {"model": "mixtral", "ep": 2}
VPP_2 = {"num_layers_per_virtual_pipeline_stage": 2}
VPP_4 = {"num_virtual_stages_per_pipeline_rank": 4}
LAST_2 = {"decoder_last_pipeline_num_layers": 2}
COUNTED = {"account_for_loss_in_pipeline_split": True}


def further(layout: str, *objectives: str, **changes: Any) -> list[Case]:
    """A layout with other objectives than the default."""
    return [Case(f"{layout}, {objective}", objective=objective, **changes) for objective in objectives]


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
    ],
    2: [
        Case("TP 2", tp=2, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("TP 2, sequence parallel, recomputation", tp=2, sequence_parallel=True, recompute="full"),
        Case("TP 2, prompts not shared", tp=2, share_prompts=False, tokens_per_microbatch=120),
        Case("TP 2, official preset", tp=2, options=OFFICIAL),
        Case("PP 2, three packs a stage", pp=2, min_packs_per_stage=3),
        Case("PP 2, one pair a pack", pp=2, tokens_per_microbatch=48),
        Case("PP 2, recomputation", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("DP 2", tokens_per_microbatch=120),
        Case("DP 2, one pair a pack", tokens_per_microbatch=48),
        Case("DP 2, overlapped reduction", overlap=True, tokens_per_microbatch=120),
        Case("DP 2, sft", objective="sft", tokens_per_microbatch=120),
        Case("CP 2", cp=2, tokens_per_microbatch=200),
        Case("CP 2, one pair a pack", cp=2, objective="dpo", tokens_per_microbatch=48),
        Case("CP 2, kto", cp=2, objective="kto", recompute="selective", tokens_per_microbatch=200),
        Case("CP 2, sft, tied", cp=2, model="tied", objective="sft", tokens_per_microbatch=120),
        Case("CP 2 by heads, recomputation", cp=2, cp_comm_type="a2a", recompute="full", tokens_per_microbatch=200),
        Case("CP 2, a reference in memory", cp=2, objective="epsilon_dpo", options={"epsilon": 0.2}, tokens_per_microbatch=200),
        Case("CP 2, EP 2", **SPARSE, cp=2, recompute="full", tokens_per_microbatch=120),
        *further("CP 2, EP 2", "dpo", "kto", "sft", **SPARSE, cp=2, tokens_per_microbatch=120),
        Case("PP 2 x VPP 2", model="eight layers", pp=2, split=VPP_2, tokens_per_microbatch=120),
        Case("PP 2 x VPP 4, dpo", model="eight layers", pp=2, split=VPP_4, objective="dpo", tokens_per_microbatch=60),
        Case("PP 2 x VPP 2, kto, recomputed", model="eight layers", pp=2, split=VPP_2, objective="kto", recompute="full"),
        Case("PP 2 x VPP 2, sft", model="eight layers", pp=2, split=VPP_2, objective="sft", tokens_per_microbatch=48),
        Case("PP 2 of 7 layers", model="seven layers", pp=2, split=LAST_2, tokens_per_microbatch=120),
        Case("PP 2 of 7 layers, dpo", model="seven layers", pp=2, split=COUNTED, objective="dpo", tokens_per_microbatch=48),
        *further("PP 2 of 7 layers", "kto", "sft", model="seven layers", pp=2, split=LAST_2, tokens_per_microbatch=120),
        Case("TP 2, one key", model="one key", tp=2, tokens_per_microbatch=200, vocab_multiple=1),
        Case("TP 2, one key, dpo", model="one key", tp=2, sequence_parallel=True, objective="dpo", vocab_multiple=3),
        *further("TP 2, one key", "kto", "sft", model="one key", tp=2, tokens_per_microbatch=200, vocab_multiple=3),
        Case("TP 2, tied", model="tied", tp=2, tokens_per_microbatch=200),
        Case("PP 2, tied", model="tied", pp=2, tokens_per_microbatch=120),
        Case("TP 2, biased attention", model="biased attention", tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        Case("EP 2", **SPARSE, tokens_per_microbatch=120),
        Case("EP 2, one pair a pack", **SPARSE, tokens_per_microbatch=48),
        Case("EP 2, official preset", **SPARSE, options=OFFICIAL, tokens_per_microbatch=120),
        Case("EP 2, every pass", **SPARSE, objective="rmipo:0.7,kto:2,beta_dpo:0.5", recompute="full", tokens_per_microbatch=120),
        Case(
            "EP 2, a reference in memory", **SPARSE, objective="epsilon_dpo", options={"epsilon": 0.2}, tokens_per_microbatch=120
        ),
    ],
    4: [
        Case("TP 2 x PP 2", tp=2, pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, sequence parallel", tp=2, pp=2, sequence_parallel=True, tokens_per_microbatch=120),
        Case("TP 2 x DP 2", tp=2, tokens_per_microbatch=120),
        Case("PP 2 x DP 2", pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, tied", model="tied", tp=2, pp=2, tokens_per_microbatch=120),
        Case("TP 2 x PP 2, biased attention", model="biased attention", tp=2, pp=2, tokens_per_microbatch=120),
        Case("CP 2 x TP 2, sequence parallel", cp=2, tp=2, sequence_parallel=True, tokens_per_microbatch=200),
        *further("CP 2 x TP 2", "dpo", "kto", "sft", cp=2, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
        Case("CP 2 x PP 2", cp=2, pp=2, tokens_per_microbatch=120),
        *further("CP 2 x PP 2", "dpo", "kto", "sft", cp=2, pp=2, tokens_per_microbatch=60),
        Case("CP 2 x DP 2, by heads", cp=2, cp_comm_type="a2a", overlap=True, tokens_per_microbatch=120),
        *further("CP 2 x DP 2", "dpo", "kto", "sft", cp=2, tokens_per_microbatch=120),
        Case("CP 2 x EP 2 x DP 2, every pass", **SPARSE, cp=2, objective="rmipo:0.7,kto:2,beta_dpo:0.5"),
        Case("PP 2 x VPP 2 x DP 2", model="eight layers", pp=2, split=VPP_2, tokens_per_microbatch=120, overlap=True),
        Case(
            "EP 2 x PP 2 x VPP 2", **SPARSE, pp=2, split={"num_layers_per_virtual_pipeline_stage": 1}, tokens_per_microbatch=120
        ),
        Case("TP 4, one key, three ranks of padding", model="one key", tp=4, objective="kto", vocab_multiple=128),
        Case("EP 2 x DP 2", **SPARSE, tokens_per_microbatch=120, overlap=True),
        Case("EP 2 x PP 2, four packs a stage", **SPARSE, pp=2, min_packs_per_stage=4),
        Case("EP 2 x TP 2, sequence parallel", **SPARSE, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
    ],
}


class Errors(NamedTuple):
    """How far a case is from the dense answer: its loss, and its gradients, of their norm, each and the one furthest off."""

    loss: float
    gradients: float
    worst: float


def check(case: Case, result: dict[str, Any], answer: tuple[float, dict[str, Tensor], dict[str, Tensor]]) -> Errors:
    """Compare loss, metrics and gradients of a case with the dense ones."""
    loss, gradients, metrics = answer
    assert result["loss"] == pytest.approx(loss, rel=1e-5), case.name
    for name, values in metrics.items():
        found = result["metrics"][name]
        if name == "rewards/accuracies":
            # Which of two equal rewards is larger is a matter of rounding.
            values, found = (torch.where(metrics["rewards/margins"].abs() < 1e-4, 0.0, column) for column in (values, found))
        approximately = pytest.approx(values.tolist(), rel=1e-4, abs=1e-4, nan_ok=True)
        assert found.tolist() == approximately, (case.name, name)
    assert result["gradients"].keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    # Some gradients are nothing but rounding: a bias of keys that are not turned changes no score against another.
    scales = {name: max(gradient.norm(), 1e-4 * largest) for name, gradient in gradients.items()}
    apart = {name: (result["gradients"][name].double() - gradient).norm() for name, gradient in gradients.items()}
    errors = {name: float(apart[name] / scales[name]) for name in gradients}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-4, (case.name, worst, errors[worst])
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert result["norm"] == pytest.approx(norm, rel=1e-4), case.name
    whole = torch.stack(list(apart.values())).norm().item() / norm
    return Errors(abs(result["loss"] / loss - 1), whole, errors[worst])


def _question(case: Case) -> str:
    return f"{case.model} {case.objective} {case.options}"


def run_and_check(
    cases: list[Case], world_size: int, pairs: list[TokenizedPair], folder: Path, run: Callable[..., Any] = run_cases
) -> list[dict[str, Any]]:
    """Run cases on so many ranks and compare each with the dense answer; what they gave."""
    problems, answers = {}, {}
    for name in {case.model: None for case in cases}:
        hf_dir = make_hf_model(folder / name / "model", **MODELS[name])
        reference_dir = make_hf_model(folder / name / "reference", seed=1, **MODELS[name])
        problems[name] = DenseProblem(hf_dir, reference_dir, pairs)
    for case in cases:
        if _question(case) not in answers:
            answers[_question(case)] = problems[case.model].answer(build_objective(case.objective, case.options))
    results = run_distributed(run, world_size, cases, str(folder), collection(pairs))[0]
    for case, result in zip(cases, results, strict=True):
        errors = check(case, result, answers[_question(case)])
        # The table of docs/training.md: pytest -rP.
        print(f"{case.name} | {case.objective} | {' | '.join(f'{error:.1e}' for error in errors)}")
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_same_loss_and_gradients_however_the_batch_is_cut(world_size: int, tmp_path: Path) -> None:
    cases = WORLDS[world_size]
    results = run_and_check(cases, world_size, make_pairs(), tmp_path)
    packs = {case.name: result["packs"] for case, result in zip(cases, results, strict=True)}
    if world_size == 1:
        assert packs["one pair a pack"] > packs["few packs"] > packs["all in one pack"] == 1, packs
    assert packs.get("PP 2, three packs a stage", 6) == 6
    assert packs.get("EP 2 x PP 2, four packs a stage", 8) == 8
