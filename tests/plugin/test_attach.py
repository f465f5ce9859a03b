"""A model that somebody else built and wrapped, attached: every way to wrap and cut it, and its owner's own calls beside ours."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.data.batches.packing import pack_pairs
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.rows import row_output
from megatron_rmipo.plugin import PreferenceStep, attach, detach, preference_batches, score
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.integration.problem import BOS, DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import end_case
from tests.plugin.foreign import build_llama

# Objective, its options, whether its passes come before the schedule.
INTERLEAVED: list[tuple[str, dict[str, Any], bool]] = [
    ("rmipo", {}, False),
    ("rmipo", {}, True),
    ("epsilon_dpo", {"epsilon": 0.2}, True),
]


def build_chunks(hf_dir: Path, groups: Any, num_chunks: int) -> list[DistributedDataParallel]:
    """The Hugging Face model cut into chunks of an interleaved pipeline, attached."""
    arch, chunks = read_architecture(hf_dir), []
    changes = {
        "virtual_pipeline_model_parallel_size": num_chunks if num_chunks > 1 else None,
        "deallocate_pipeline_outputs": True,
    }
    for stage in range(num_chunks):
        inner = build_llama(arch, groups, vp_stage=stage if num_chunks > 1 else None, **changes)
        load_hf_weights(inner, hf_dir, arch, groups=groups)
        inner.config.finalize_model_grads_func = finalize_model_grads
        chunks.append(DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner))
    attach(chunks, vocab_size=arch.vocab_size)
    return chunks


def gradients_of(chunks: list[DistributedDataParallel]) -> dict[str, Tensor]:
    """By name, layers numbered over all stages."""
    gradients = {}
    for chunk in chunks:
        for place, layer in enumerate(chunk.module.decoder.layers):
            for name, parameter in layer.named_parameters():
                gradients[f"layers.{layer.layer_number}.{name}"] = parameter.main_grad.clone()
            assert f"decoder.layers.{place}." in next(name for name, p in chunk.module.named_parameters() if p is parameter)
        for name, parameter in chunk.module.named_parameters():
            if ".layers." not in name:
                gradients[name] = parameter.main_grad.clone()
    return gradients


Results = list[tuple[float, dict[str, Tensor], Any]]


def steps_at_layouts(layouts: list[tuple[int, int, int]], folder: str) -> list[Results]:
    """At each (tensor-parallel size, pipeline stages, chunks of each) what :func:`bare_steps` gives."""
    results = []
    for tp, pp, num_chunks in layouts:
        groups = initialize_runtime(tp, pp)
        if num_chunks > 1:
            parallel_state.set_virtual_pipeline_model_parallel_world_size(num_chunks)
        results.append(bare_steps(groups, num_chunks, folder))
        end_case()
    return results


def bare_steps(groups: ProcessGroups, num_chunks: int, folder: str) -> Results:
    """Loss, this rank's gradients and log-probs before the step of each of the objectives, in a bare loop."""
    results = []
    for name, options, before_step in INTERLEAVED:
        chunks = build_chunks(Path(folder) / "model", groups, num_chunks)
        objective, pairs = build_objective(name, options), collection(make_pairs())
        reference = build_chunks(Path(folder) / "reference", groups, num_chunks) if name == "epsilon_dpo" else None
        # Rows of several lengths.
        scores = score(chunks, pairs, tokens_per_microbatch=90).logps
        batches = preference_batches(
            pairs,
            objective,
            global_batch_size=len(pairs),
            num_microbatches=4,
            # Between two ranks Megatron's interleaved schedule mixes up lengths that differ.
            pad_to=260,
            context_token_id=BOS,
            unconditional="pass" if before_step else "rows",
        )
        step = PreferenceStep(objective, reference=reference)
        if before_step:
            step.before_step(chunks, batches.peek())
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches.chunks(num_chunks),
            model=chunks,
            num_microbatches=4,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        loss = step.after_step().values["loss"].double().mean().item()
        results.append((loss, gradients_of(chunks), scores))
    return results


@pytest.mark.dist
def test_chunks_of_a_pipeline_and_a_resident_reference_give_the_loss_and_the_gradients_of_one_rank(tmp_path: Path) -> None:
    pairs = make_pairs()
    problem = DenseProblem(make_hf_model(tmp_path / "model"), make_hf_model(tmp_path / "reference", seed=1), pairs)
    ((whole,),) = run_distributed(steps_at_layouts, 1, [(1, 1, 1)], str(tmp_path))
    by_rank = run_distributed(steps_at_layouts, 2, [(1, 2, 2), (2, 1, 1)], str(tmp_path))
    for number, (name, options, _) in enumerate(INTERLEAVED):
        expected = problem.answer(build_objective(name, options))[0]
        one_rank = whole[number][1]
        for results in ([whole], *([*found] for found in by_rank)):
            for result in results:
                assert result[number][0] == pytest.approx(expected, rel=1e-5), name
                np.testing.assert_allclose(result[number][2], problem.conditional.detach(), rtol=1e-5, atol=1e-5)
        stages, shards = ([found[layout][number][1] for found in by_rank] for layout in (0, 1))
        assert not stages[0].keys() & stages[1].keys()
        chunks = stages[0] | stages[1]
        assert chunks.keys() == shards[0].keys() == one_rank.keys()
        for key, gradient in one_rank.items():
            assert (chunks[key] - gradient).norm() < 1e-5 * gradient.norm(), (name, key)
            if shards[0][key].shape == gradient.shape:
                assert (shards[0][key] - gradient).norm() < 1e-5 * gradient.norm(), (name, key)


# bf16 parameters and their wrapper, gradients and parameters that travel while others are computed.
WRAPPED = [(False, False), (False, True), (True, False), (True, True)]


def wrap(inner: Any, *, bf16: bool, overlap: bool) -> tuple[DistributedDataParallel, Any]:
    """As training loops do it; the model and its optimizer."""
    inner.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=overlap, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    model = DistributedDataParallel(inner.config, ddp, Float16Module(inner.config, inner) if bf16 else inner)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, bf16=bf16, use_distributed_optimizer=overlap, clip_grad=0.0),
        [model],
        use_gloo_process_groups=False,
    )
    return model, optimizer


def wrapped_calls(folder: str) -> list[dict[str, Any]]:
    """Of each way to wrap: gradients of the owner's call before and after attaching, of a packed one, and of both in a step."""
    groups = initialize_runtime()
    arch, pairs = read_architecture(Path(folder)), make_pairs(6, seed=groups.rank)
    row = pack_pairs(pairs, range(6))
    tokens = torch.from_numpy(pairs[0].prompt)[None]

    def owners(model: Any) -> Tensor:
        logits: Tensor = model(tokens, torch.arange(tokens.shape[1])[None], None)
        return logits.float().square().mean()

    def packed(model: Any) -> Tensor:
        return row_output(model, row).sum() / 50

    def step(model: Any, *calls: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad_buffer()
        losses = []
        for number, call in enumerate(calls):
            with model.no_sync() if number + 1 < len(calls) else contextlib.nullcontext():
                losses.append(call(model))
                losses[-1].backward()
        model.finish_grad_sync()
        return [loss.detach() for loss in losses], {name: p.main_grad.clone() for name, p in unwrapped(model).named_parameters()}

    results = []
    for bf16, overlap in WRAPPED:
        dtype = torch.bfloat16 if bf16 else torch.float32
        inner = build_llama(arch, groups, bf16=bf16, params_dtype=dtype)
        load_hf_weights(inner, Path(folder), arch, groups=groups)
        model, optimizer = wrap(inner, bf16=bf16, overlap=overlap)
        found: dict[str, Any] = {"before": step(model, owners)}
        # Inside of the wrappers, whose hooks are there already.
        attach(inner, vocab_size=arch.vocab_size)
        found["after"], found["packed"] = step(model, owners), step(model, packed)
        found["both"] = step(model, owners, packed)
        assert optimizer.step()[0]
        # The first call since, where parameters may still be on their way.
        found["moved"] = step(model, packed)
        detach(model)
        found["detached"] = step(model, owners)
        results.append(found)
    shutdown_runtime()
    return results


@pytest.mark.dist
def test_the_owners_call_and_ours_share_a_step_in_every_wrapper(tmp_path: Path) -> None:
    by_rank = run_distributed(wrapped_calls, 2, str(make_hf_model(tmp_path / "model")))
    plain, overlapped = 0, 1
    for found in by_rank:
        for one, (bf16, _) in zip(found, WRAPPED, strict=True):
            assert torch.equal(one["before"][0][0], one["after"][0][0])
            for name, gradient in one["before"][1].items():
                assert torch.equal(gradient, one["after"][1][name]), name
                total = gradient + one["packed"][1][name]
                assert (one["both"][1][name] - total).norm() <= 1e-5 * total.norm(), name
            assert (one["moved"][0][0] - one["packed"][0][0]).abs() > 1e-2
            assert one["detached"][0][0] != one["after"][0][0]
            exact = found[plain]["packed"][0][0].item()
            assert one["packed"][0][0].item() == pytest.approx(exact, rel=2e-2 if bf16 else 1e-6)
        # The distributed optimizer's buffers hold sums over ranks in part.
        for name, gradient in found[plain]["packed"][1].items():
            assert (found[2]["packed"][1][name] - gradient).norm() < 0.1 * gradient.norm(), name
        for first in (0, 2):
            moved = [found[first + which]["moved"] for which in (plain, overlapped)]
            assert moved[1][0][0].item() == pytest.approx(moved[0][0][0].item(), rel=1e-6)
