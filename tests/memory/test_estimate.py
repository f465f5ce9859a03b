"""Estimated bytes against what torch's allocator is asked for, and against sizes added up by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measure import peak_bytes
from megatron_rmipo.config.flags.memory import MemoryConfig, RecomputeModule
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.families.architecture import Experts, LatentAttention, LayerKind, ModelArchitecture, Rope
from megatron_rmipo.families.tensors import active_parameters, num_parameters
from megatron_rmipo.memory.estimate import pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.step_passes import evaluation_pass, gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.training.setup import build_training_state
from tests.harness import run_distributed
from tests.integration.problem import collection
from tests.integration.worlds import end_case

ARCH = ModelArchitecture("llama", 3, 64, 168, 4, 2, 16, 1000, 4096, (Rope(1e4),), 1e-5)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OLMO2 = {"pre_norm": False, "post_norm": True, "qk_norm_whole": True}
GEMMA = {"post_norm": True, "zero_centered_norm": True, "activation": "gelu_tanh", "embedding_multiplier": 8.0}
GPT_OSS = {
    "family": "gpt_oss",
    "activation": "clamped_swiglu",
    "activation_limit": 7.0,
    "attention_sinks": True,
    "experts": Experts(8, 2, 96, bias=True, router_bias=True),
    "layer_kinds": (LayerKind(window=64), LayerKind(), LayerKind(window=64)),
}
LATENT = {
    "family": "deepseek_v2",
    "num_query_groups": 4,
    "kv_channels": 24,
    "rotary_channels": 8,
    "latent": LatentAttention(48, 32, 16, 8, 16),
}
# Name -> changes of the model, and of its flags.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one layer": ({"num_layers": 1}, {}),
    "wide": ({"hidden_size": 136}, {}),
    "large MLP": ({"ffn_hidden_size": 376}, {}),
    "many heads": ({"num_attention_heads": 8, "num_query_groups": 8}, {}),
    "head size": ({"kv_channels": 40}, {}),
    "norms of queries and keys": ({"kv_channels": 40, "qk_norm": True}, {}),
    "norms of queries and keys, bf16": ({"kv_channels": 40, "qk_norm": True}, {"bf16": True}),
    "norms after": (OLMO2, {}),
    "norms after, bf16": (OLMO2 | {"kv_channels": 40}, {"bf16": True}),
    "norms before and after": (GEMMA, {}),
    "norms before and after, bf16": (GEMMA | {"hidden_size": 136}, {"bf16": True}),
    "biases": ({"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}, {}),
    "selective": ({}, {"recompute_granularity": "selective"}),
    "full": ({}, FULL),
    "full, two layers": ({"num_layers": 4}, FULL | {"recompute_num_layers": 2}),
    "full, blocks": ({"num_layers": 4}, FULL | {"recompute_method": "block", "recompute_num_layers": 3}),
    "bf16": ({}, {"bf16": True}),
    "bf16, full": ({"num_layers": 5}, {"bf16": True, **FULL}),
    "large vocabulary": ({"num_layers": 1, "vocab_size": 9000}, {"logprob_chunk_size": 2500}),
    "large vocabulary, bf16": ({"num_layers": 1, "vocab_size": 9000}, {"logprob_chunk_size": 2500, "bf16": True}),
    "products, bf16": (
        {"num_layers": 1, "hidden_size": 512, "vocab_size": 2000},
        {"logprob_chunk_size": 2000, "bf16": True},
    ),
    "experts": ({"hidden_size": 136, "experts": Experts(8, 2, 96)}, {}),
    "experts, full": ({"hidden_size": 136, "num_layers": 7, "experts": Experts(8, 2, 96)}, FULL),
    "experts, bf16": ({"experts": Experts(8, 4, 40)}, {"bf16": True}),
    "many experts": ({"experts": Experts(64, 4, 24)}, {}),
    "shared experts": ({"experts": Experts(8, 2, 96, dense_layers=frozenset({0}), shared_ffn_hidden_size=80)}, {}),
    "sinks, windows, clamped experts": (GPT_OSS, {}),
    "sinks, windows, clamped experts, bf16, full": (GPT_OSS, {"bf16": True, **FULL}),
    "soft caps": ({"attention_softcap": 50.0}, {}),
    "soft caps, bf16": ({"attention_softcap": 50.0}, {"bf16": True}),
    "soft caps, selective": ({"attention_softcap": 50.0}, {"recompute_granularity": "selective"}),
    "latent attention": (LATENT, {}),
    "latent attention, bf16": (LATENT, {"bf16": True}),
    "whole vocabulary": ({"num_layers": 1, "vocab_size": 5000}, {"logprob_chunk_size": 5000}),
}


def pairs_of(arch: ModelArchitecture) -> PairCollection:
    random = np.random.default_rng(3)
    lengths = [(90, 70, 50), (31, 120, 83), (150, 20, 41)]
    return collection([TokenizedPair(*(random.integers(3, arch.vocab_size, size=size) for size in one)) for one in lengths])


def config_of(changes: dict[str, Any]) -> Config:
    model = ModelConfig(make_vocab_size_divisible_by=8, **{"logprob_chunk_size": 256, **changes})
    return Config(model=model, optimizer=OptimizerConfig(lr=1e-3))


def measured(
    objective_name: str, cases: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, tuple[PackSize, int, int]]:
    """Of each case the pack, the most bytes of its gradient pass and of a pass without a backward."""
    found = {}
    for name, (model_changes, flag_changes) in cases.items():
        groups = initialize_runtime()
        arch, config = dataclasses.replace(ARCH, **model_changes), config_of(flag_changes)
        state = build_training_state(build_model(arch, config, groups), config, groups, train_iters=9)
        objective = build_objective(objective_name, {})
        reference = build_model(arch, config, groups).requires_grad_(False).eval()
        layout = BatchLayout(dp_rank=0, dp_size=1, tokens_per_microbatch=2000, cost=forward_cost_model(arch))
        batch = BatchBuilder(pairs_of(arch), layout).build(np.arange(3))
        arguments: Any = (state.model, batch, objective)
        prepared = prepare_batch(*arguments, objective.initial_state(), groups, reference)
        state.model.zero_grad_buffer()
        state.model.train()
        backward = peak_bytes(lambda: gradient_pass(*arguments, prepared, groups))  # noqa: B023
        state.model.eval()
        with torch.no_grad():
            forward = peak_bytes(lambda: evaluation_pass(*arguments, prepared, groups))  # noqa: B023
        (row,) = batch.conditional
        found[name] = (PackSize.of_row(row), backward, forward)
        end_case()
    return found


@pytest.mark.dist
def test_the_estimate_of_a_pack_is_within_a_seventh_of_what_is_allocated() -> None:
    peaks = run_distributed(measured, 1, "simpo", CASES)[0]
    mixed = run_distributed(measured, 1, "epsilon_dpo", {name: CASES[name] for name in ("plain", "large vocabulary")})[0]
    for is_mixed, found in ((False, peaks), (True, mixed)):
        for name, (pack, backward, forward) in found.items():
            arch, config = dataclasses.replace(ARCH, **CASES[name][0]), config_of(CASES[name][1])
            assert pack.num_scored == 70 + 50 + 120 + 83 + 20 + 41
            estimate = pack_memory(arch, config, pack, backward=True, mixed=is_mixed)
            assert 6 / 7 < estimate.peak / backward < 7 / 6, (name, estimate, backward)
            alone = pack_memory(arch, config, pack, backward=False, mixed=is_mixed)
            assert 6 / 7 < alone.peak / forward < 7 / 6, (name, alone, forward)
            assert (alone.activations > 0) == is_mixed


def llama(**changes: Any) -> Config:
    parallel = ParallelConfig(**{name: value for name, value in changes.items() if name in ParallelConfig.__dataclass_fields__})
    model = ModelConfig(**{name: value for name, value in changes.items() if name in ModelConfig.__dataclass_fields__})
    return Config(parallel=parallel, model=model)


LLAMA_3_8B = ModelArchitecture("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, (Rope(5e5),), 1e-5)
# Its published number of parameters; at tp 1 and 2 its vocabulary needs no padding.
PARAMETERS = 8_030_261_248


def test_what_stands_follows_from_the_number_of_parameters() -> None:
    standing = standing_memory(LLAMA_3_8B, llama(bf16=True), 1, 0)
    assert standing.weights == 2 * PARAMETERS
    assert standing.gradients == 4 * PARAMETERS
    assert standing.master_weights == 4 * PARAMETERS
    assert standing.moments == 8 * PARAMETERS
    assert standing.total == standing.weights + standing.gradients + standing.optimizer == 18 * PARAMETERS
    plain = standing_memory(LLAMA_3_8B, llama(), 1, 0)
    assert plain.total == 16 * PARAMETERS
    assert plain.master_weights == 0
    assert standing_memory(LLAMA_3_8B, llama(bf16=True), 1, 0, trains=False).total == standing.weights
    sharded = standing_memory(LLAMA_3_8B, llama(bf16=True, use_distributed_optimizer=True), 8, 0)
    assert (sharded.weights, sharded.optimizer) == (standing.weights, standing.optimizer / 8)
    # Norms, 2 of 4096 for each layer and one at the end, are on both ranks.
    shared = standing_memory(LLAMA_3_8B, llama(bf16=True, tensor_model_parallel_size=2), 8, 0)
    assert shared.weights == PARAMETERS + 65 * 4096
    staged = [standing_memory(LLAMA_3_8B, llama(bf16=True, pipeline_model_parallel_size=2), 2, stage).weights for stage in (0, 1)]
    assert staged == [PARAMETERS - 4096, PARAMETERS + 4096]


def test_experts_stand_on_the_ranks_that_hold_them() -> None:
    mixtral = ModelArchitecture(
        "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, (Rope(1e6),), 1e-5, experts=Experts(8, 2, 14336)
    )
    # As published: 46.7 B, of which a token uses 12.9 B.
    total, expert = 46_702_792_704, 32 * 3 * 4096 * 14336
    assert num_parameters(mixtral) == total
    assert active_parameters(mixtral) == total - 6 * expert
    assert active_parameters(LLAMA_3_8B) == PARAMETERS
    rest = total - 8 * expert
    assert standing_memory(mixtral, llama(), 8, 0).weights == 4 * total
    spread = llama(expert_model_parallel_size=4, use_distributed_optimizer=True)
    shared = standing_memory(mixtral, spread, 8, 0)
    assert shared.weights == 4 * (rest + 2 * expert)
    # The same experts are on two ranks of eight, the rest is on all.
    assert shared.moments == 8 * (rest / 8 + 2 * expert / 2)
    cut = llama(expert_model_parallel_size=2, tensor_model_parallel_size=2)
    assert standing_memory(mixtral, cut, 8, 0).weights == pytest.approx(4 * (rest / 2 + 2 * expert), rel=1e-3)


def test_norms_and_biases_after_a_sum_are_whole_on_every_rank() -> None:
    biases = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True, "family": "qwen3"}
    arch = dataclasses.replace(LLAMA_3_8B, **biases)
    for tp in (1, 2):
        config = llama(tensor_model_parallel_size=tp)
        more = standing_memory(arch, config, tp, 0).gradients - standing_memory(LLAMA_3_8B, config, tp, 0).gradients
        cut = 4096 + 2 * 1024 + 2 * 14336
        assert more == 4 * 32 * (cut / tp + 2 * 4096 + 2 * 128), tp
    assert num_parameters(arch) - PARAMETERS == 32 * (cut + 2 * 4096 + 2 * 128)


def test_activations_are_those_of_the_layers_added_up() -> None:
    pack = PackSize(num_tokens=8192, num_scored=4096)
    # Norms' inputs and outputs; projection's output, rotated queries and keys, cosines and sines, two outputs; fused MLP.
    layer = 4 * 4096 + (4096 + 2 * 1024) + (4096 + 1024) + 4 * 128 + 2 * 4096 + 3 * 14336
    plain = pack_memory(LLAMA_3_8B, llama(bf16=True), pack, backward=True, fused=True)
    assert plain.activations == 2 * 8192 * 32 * layer
    full = pack_memory(LLAMA_3_8B, llama(bf16=True, **FULL), pack, backward=True, fused=True)
    assert full.activations == 2 * 8192 * 32 * 4096
    assert full.layer - plain.layer == 2 * 8192 * layer
    # Sequence parallelism leaves nothing whole but cosines and sines.
    split = llama(bf16=True, tensor_model_parallel_size=4, sequence_parallel=True)
    shared = pack_memory(LLAMA_3_8B, split, pack, backward=True, fused=True)
    assert shared.activations == 2 * 8192 * 32 * ((layer - 4 * 128) / 4 + 4 * 128)
    staged = llama(bf16=True, pipeline_model_parallel_size=4)
    for stage, packs in enumerate((4, 3, 2, 1)):
        flying = pack_memory(LLAMA_3_8B, staged, pack, backward=True, fused=True, stage=stage)
        # What goes on to the next stage is kept, too.
        assert flying.activations == packs * (plain.activations / 4 + (stage < 3) * 2 * 8192 * 4096)
        assert flying.packs == packs
        for backward in (True, False):
            one = pack_memory(LLAMA_3_8B, staged, pack, backward=backward, fused=True, stage=stage)
            assert (one.head > 0) == (stage == 3)
            assert one.layer > 0


def test_norms_made_anew_stay_beside_the_module_that_they_feed() -> None:
    def layer(*modules: RecomputeModule) -> float:
        config = llama(bf16=True, recompute_granularity="selective")
        config = dataclasses.replace(config, memory=MemoryConfig(recompute_modules=list(modules)))
        return pack_memory(LLAMA_3_8B, config, PackSize(8192, 4096), backward=True, fused=True).layer

    norms = 2 * 8192 * 2 * 4096
    assert layer("layernorm", "mlp") - layer("mlp") == norms
    assert layer("core_attn", "mlp", "layernorm") == layer("mlp", "layernorm")


def test_the_head_grows_with_the_chunk_and_not_with_the_vocabulary() -> None:
    pack = PackSize(num_tokens=8192, num_scored=4096)

    def head(vocab_size: int, chunk: int, *, bf16: bool = True) -> float:
        arch = dataclasses.replace(LLAMA_3_8B, vocab_size=vocab_size)
        return pack_memory(arch, llama(bf16=bf16, logprob_chunk_size=chunk), pack, backward=False, fused=True).head

    assert head(128256, 4096) == head(32000, 4096)
    for bf16 in (True, False):
        assert head(128256, 8192, bf16=bf16) - head(128256, 4096, bf16=bf16) == 4096 * 4096 * 4, "fp32 logits of one chunk"
    assert head(2048, 4096) < head(2048 + 4096, 4096)
