"""Models with adapters of Megatron-Bridge: scored with them, and without them as the reference; a stand-in of its wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_rmipo.plugin as plugin
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, run_at_layouts
from tests.plugin.bridge_adapters import ALPHA, DIM, KINDS, fill_adapters, write_adapted
from tests.plugin.bridge_wrappers import wrap_linears
from tests.plugin.foreign import Foreign, build_foreign, build_llama, run_schedule
from tests.plugin.test_scores import lists_of

LAYOUTS = {
    1: [Case("alone")],
    2: [Case("TP 2", tp=2), Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2)],
}
FEW: dict[str, Any] = {"tokens_per_microbatch": 60}


def build_adapted(case: Case, hf_dir: Path, groups: ProcessGroups, kind: Any, *, dropout: float = 0.0) -> Foreign:
    """The Hugging Face model as a plain GPTModel in DDP with adapters, not attached."""
    arch = read_architecture(hf_dir)
    inner = build_llama(arch, groups, sequence_parallel=case.sequence_parallel)
    load_hf_weights(inner, hf_dir, arch, groups=groups)
    wrap_linears(inner, kind, dim=DIM, alpha=ALPHA, dropout=dropout)
    assert fill_adapters(inner, arch, groups) > 0
    inner.config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
    return Foreign(model, arch, groups)


def scores_with_and_without(cases: list[Case], folder: str, kind: Any) -> list[dict[str, Any]]:
    """Of each case log-probs with and without the adapters, and what a reference is given."""

    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> dict[str, Any]:
        foreign, rows = build_adapted(case, Path(folder) / "model", groups, kind), lists_of(pairs)
        plugin.attach(foreign.model, vocab_size=foreign.arch.vocab_size)
        found = {"on": plugin.score(foreign.model, rows, **FEW).logps}
        with plugin.adapters_off(foreign.model):
            found["off"] = plugin.score(foreign.model, rows, **FEW).logps
        kept = collection(pairs)
        plugin.score_reference(foreign.model, kept, build_objective("dpo", {}), **FEW)
        found |= {"reference": kept.scores_of(np.arange(len(pairs))), "again": plugin.score(foreign.model, rows, **FEW).logps}
        return found

    return run_at_layouts(compute, cases, folder, make_pairs())  # type: ignore[arg-type]


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_scores_are_the_dense_ones_with_adapters_and_without(world_size: int, kind: Any, tmp_path: Path) -> None:
    base = make_hf_model(tmp_path / "model", layers=2)
    problem = DenseProblem(write_adapted(base, tmp_path / "adapted", kind), base, make_pairs())
    on = problem.conditional.detach().numpy()
    with torch.no_grad():
        off = problem._table(problem.reference, problem.pairs).numpy()
    assert np.abs(on - off).max() > 0.5
    # Lengths of rows whose columns are cut are refused below.
    cases = [case for case in LAYOUTS[world_size] if kind != "DoRA" or case.tp == 1]
    for results in run_distributed(scores_with_and_without, world_size, cases, str(tmp_path), kind):
        for case, found in zip(cases, results, strict=True):
            for name, dense in (("on", on), ("off", off), ("reference", off), ("again", on)):
                np.testing.assert_allclose(found[name], dense, rtol=1e-5, atol=2e-5, err_msg=f"{case.name}, {name}")


def _batches(pairs: Any, objective: Any, groups: ProcessGroups) -> Any:
    return plugin.preference_batches(
        collection(pairs), objective, global_batch_size=len(pairs), num_microbatches=5, groups=groups
    )


def reports_of_references(cases: list[Case], folder: str) -> list[Any]:
    """Losses of a step whose reference is in memory: the model itself, a second one, and what is refused."""
    objective = build_objective("epsilon_dpo", {"epsilon": 0.2})

    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> list[Any]:
        plain = build_foreign(case, Path(folder) / "model", groups)
        adapted = build_adapted(case, Path(folder) / "model", groups, "LoRA")
        plugin.attach(adapted.model, vocab_size=adapted.arch.vocab_size)
        losses = []
        for trained, reference in ((adapted, adapted), (adapted, plain)):
            step = plugin.PreferenceStep(objective, reference=reference.model, groups=groups)
            batches = _batches(pairs, objective, groups)
            step.before_step(trained.model, batches.peek())
            run_schedule(trained, step, batches, num_microbatches=5)
            losses.append(step.after_step().values["loss"])
        step = plugin.PreferenceStep(objective, reference=plain.model, groups=groups)
        with pytest.raises(ConfigError, match="the reference is the model that is trained, which has no adapters"):
            step.before_step(plain.model, _batches(pairs, objective, groups).peek())
        return losses

    return run_at_layouts(compute, cases, folder, make_pairs())  # type: ignore[arg-type]


@pytest.mark.dist
def test_the_model_without_adapters_is_its_own_reference(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "model", layers=2)
    for results in run_distributed(reports_of_references, 2, [Case("PP 2", pp=2), Case("TP 2", tp=2)], str(tmp_path)):
        for within, beside in results:
            torch.testing.assert_close(within, beside, rtol=1e-6, atol=1e-6)
            assert within.numel() == len(make_pairs())


def refusals(folder: str) -> None:
    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> None:
        hf_dir = Path(folder)
        plain = build_foreign(case, hf_dir, groups)
        with (
            pytest.raises(ConfigError, match="this GPTModel has no adapters that could be off"),
            plugin.adapters_off(plain.model),
        ):
            pass
        dropping = build_adapted(case, hf_dir, groups, "LoRA", dropout=0.1)
        with pytest.raises(ConfigError, match=r"adapter\.dropout: dropout of 0\.1 would make a loss depend on how"):
            plugin.attach(dropping.model, vocab_size=dropping.arch.vocab_size)
        split = build_adapted(case, hf_dir, groups, "CanonicalLoRA")
        inner: Any = split.model.module
        held = inner.decoder.layers[1].self_attention.linear_qkv.adapter
        own, held._modules["adapter_k"] = held["adapter_k"], None
        with pytest.raises(ConfigError, match=r"layers\.1\.self_attention\.linear_qkv: adapter_k is missing, which a SplitQKV"):
            plugin.attach(split.model, vocab_size=split.arch.vocab_size)
        held._modules["adapter_k"] = own
        inner.config.tensor_model_parallel_size = 4
        with pytest.raises(ConfigError, match="2 key/value heads over 4 ranks share some"):
            plugin.attach(split.model, vocab_size=split.arch.vocab_size)
        inner.config.tensor_model_parallel_size = 1
        plugin.attach(split.model, vocab_size=split.arch.vocab_size)
        lengths = build_adapted(case, hf_dir, groups, "DoRA")
        lengths.model.module.config.tensor_model_parallel_size = 2
        with pytest.raises(ConfigError, match=r"1\.mlp\.linear_fc2: the columns of its weight are cut over 2 ranks"):
            plugin.attach(lengths.model, vocab_size=lengths.arch.vocab_size)
        inner.decoder.final_layernorm.weight.requires_grad_(True)
        message = r"decoder\.final_layernorm\.weight is trained beside the adapters"
        with pytest.raises(ConfigError, match=message), plugin.adapters_off(split.model):
            pass
        inner.decoder.final_layernorm.weight.requires_grad_(False)
        one = inner.decoder.layers[0].mlp.linear_fc1
        one._adapter_enabled = False
        with plugin.adapters_off(split.model):
            assert not any(module._adapter_enabled for module in inner.modules() if hasattr(module, "_adapter_enabled"))
        states = [module._adapter_enabled for module in inner.modules() if hasattr(module, "_adapter_enabled")]
        assert not one._adapter_enabled
        assert states.count(False) == 1
        plugin.detach(split.model)
        assert "_interleave_qkv" not in vars(inner.decoder.layers[0].self_attention.linear_qkv)

    run_at_layouts(compute, [Case("alone")], folder, None)  # type: ignore[arg-type]


@pytest.mark.dist
def test_what_cannot_be_scored_or_switched_off_is_refused(tmp_path: Path) -> None:
    run_distributed(refusals, 1, str(make_hf_model(tmp_path / "model", layers=2)))
