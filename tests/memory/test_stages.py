"""What every stage needs, against what ranks allocate; and what flags change of it, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.bench_memory import MOST_ERROR, make_row
from benchmarks.memory_layouts import LAYOUTS, count_layouts
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import CheckpointConfig, Config, ModelConfig
from megatron_rmipo.families.architecture import Experts, ModelArchitecture, Rope
from megatron_rmipo.memory.pack import PackSize, Segment
from megatron_rmipo.memory.stages import StageMemory, neediest, stage_memories
from tests.harness import run_distributed

LLAMA = ModelArchitecture("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, (Rope(5e5),), 1e-5)
PARAMETERS = 8_030_261_248
PACK = PackSize(num_tokens=8192, num_scored=4096)
# Of those of the benchmark, which has the others.
SAMPLE = ("TP 2, sequence parallel", "PP 2", "DP 2, distributed optimizer, bf16", "EP 2, TP 2, sequence parallel, bf16")
SAMPLE_OF_ADAPTERS = (
    *("LoRA, one rank", "LoRA of some modules, others whole, bf16", "LoRA, the reference without it"),
    *("LoRA, TP 2, sequence parallel, bf16", "LoRA, EP 2, experts, distributed optimizer"),
)
# Numbers in a rank-16 adapter of every matrix: of column-parallel ones B is cut and A is whole, of row-parallel ones the other.
ADAPTER_CUT = 32 * 16 * ((4096 + 2 * 1024) + 4096 + 2 * 14336 + 14336)
ADAPTER_WHOLE = 32 * 16 * (3 * 4096 + 4096 + 2 * 4096 + 4096)
ADAPTER = ADAPTER_CUT + ADAPTER_WHOLE


def config(
    *,
    model: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    return Config(
        lora=LoraConfig(**(lora or {})),
        parallel=ParallelConfig(**parallel),
        model=ModelConfig(bf16=True, **(model or {})),
        memory=MemoryConfig(**(memory or {})),
    )


def one(flags: Config, *, world_size: int = 1, arch: ModelArchitecture = LLAMA, **more: Any) -> StageMemory:
    return neediest(stage_memories(arch, flags, world_size=world_size, pack=PACK, **more))


@pytest.mark.dist
def test_ranks_of_a_layout_allocate_what_is_estimated() -> None:
    sample = [layout for layout in LAYOUTS if layout.name in SAMPLE]
    assert len(sample) == len(SAMPLE)
    for layout, *ranks in zip(sample, *run_distributed(count_layouts, 2, sample), strict=True):
        for counted in ranks:
            row = make_row(layout, counted)
            assert row["error"] < MOST_ERROR, row


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_with_adapters_allocate_what_is_estimated(size: int) -> None:
    sample = [layout for layout in LAYOUTS if layout.name in SAMPLE_OF_ADAPTERS and layout.ranks == size]
    assert len(sample) == {1: 3, 2: 2}[size]
    for layout, *ranks in zip(sample, *run_distributed(count_layouts, size, sample), strict=True):
        for counted in ranks:
            row = make_row(layout, counted)
            assert row["error"] < MOST_ERROR, row


def test_frozen_weights_have_no_gradients_and_no_state() -> None:
    found = one(config(lora={"lora_rank": 16})).standing
    assert found.weights == 2 * PARAMETERS + 4 * ADAPTER
    # An adapter is in fp32, and is what is updated.
    assert (found.gradients, found.master_weights, found.moments) == (4 * ADAPTER, 0, 8 * ADAPTER)
    assert found.reference == 0
    shared = one(config(lora={"lora_rank": 16}, tensor_model_parallel_size=2), world_size=2).standing
    assert shared.gradients == 4 * (ADAPTER_CUT / 2 + ADAPTER_WHOLE)
    sharded = one(config(lora={"lora_rank": 16}, use_distributed_optimizer=True), world_size=8).standing
    assert (sharded.gradients, sharded.moments) == (4 * ADAPTER, 8 * ADAPTER / 8)
    staged = stage_memories(LLAMA, config(lora={"lora_rank": 16}, pipeline_model_parallel_size=4), world_size=4, pack=PACK)
    assert [stage.standing.gradients for stage in staged] == [ADAPTER] * 4
    scoring = one(config(lora={"lora_rank": 16}), trains=False).standing
    assert (scoring.total, scoring.weights) == (found.weights, found.weights)


def test_the_reference_of_an_adapter_is_the_model_without_it() -> None:
    lora: dict[str, Any] = {"lora_rank": 16}
    mixed = one(config(lora=lora), reference=LLAMA, num_microbatches=3)
    assert mixed.standing.reference == 0
    assert mixed.pack.activations - one(config(lora=lora), num_microbatches=3).pack.activations == 3 * 4096 * 4096 * 2
    another = one(config(lora=lora | {"reference_adapter": "DIR"}), reference=LLAMA).standing
    assert another.reference == 4 * ADAPTER
    named = one(config(lora=lora, model={"reference_hf": "DIR"}), reference=LLAMA).standing
    assert named.reference == 2 * PARAMETERS


def test_modules_that_are_trained_whole_stand_twice() -> None:
    lora = {"lora_rank": 16, "lora_target_modules": ["linear_qkv"], "lora_modules_to_save": ["lm_head", "o_proj", "norm"]}
    outer, inner, norm = 128256 * 4096, 32 * 4096 * 4096, 4096
    adapter = 32 * 16 * (6144 + 3 * 4096)
    found = one(config(lora=lora)).standing
    assert found.reference == 2 * (outer + inner + norm)
    assert found.gradients == 4 * (outer + inner + norm + adapter)
    assert found.master_weights == 4 * (outer + inner + norm)
    assert found.moments == 8 * (outer + inner + norm + adapter)
    staged = stage_memories(LLAMA, config(lora=lora, pipeline_model_parallel_size=2), world_size=2, pack=PACK)
    assert [stage.standing.reference for stage in staged] == [inner, inner + 2 * (outer + norm)]
    shared = one(config(lora=lora, tensor_model_parallel_size=2), world_size=2).standing
    assert shared.reference == outer + inner + 2 * norm


def test_frozen_matrices_in_fewer_bits() -> None:
    matrices = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    plain = one(config(lora={"lora_rank": 16}))
    for kind, saved in (("int8", 2 - 8.5 / 8), ("nf4", 2 - 4.5 / 8)):
        found = one(config(lora={"lora_rank": 16, "quantize_base": kind}))
        assert plain.standing.weights - found.standing.weights == saved * matrices
        # The largest one is made anew for each product.
        assert found.pack.layer - plain.pack.layer == 2 * 4096 * 2 * 14336


def test_inputs_are_kept_where_an_adapter_needs_them() -> None:
    def activations(*names: str) -> float:
        lora = {"lora_rank": 16, "lora_target_modules": list(names)}
        return one(config(lora=lora)).pack.activations / 32 / 2

    every, some = activations("all-linear"), activations("o_proj", "up_proj")
    # Normed hidden states before the attention, the product before the last matrix; what the adapters of the others multiply.
    projections = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "gate": (4096, 28672), "down": (14336, 4096)}
    inputs = 8192 * (4096 + 14336)
    narrow = 8192 * 16 * len(projections)
    # A one below the other; B as high as the layer's output each, zeros among it.
    columns = 16 * sum(columns for columns, _ in projections.values())
    rows = 16 * (3 * 6144 + 28672 + 4096)
    assert every - some == inputs + narrow + columns + rows
    assert every < one(config()).pack.activations / 32 / 2 * 1.02


def test_parts_add_up_to_the_peak() -> None:
    found = one(config())
    parts = found.parts()
    taking_turns = [parts.pop(name) for name in ("log-prob chunks", "working")]
    assert found.peak == pytest.approx(sum(parts.values()) + max(taking_turns))
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * PARAMETERS, 4 * PARAMETERS, 12 * PARAMETERS)
    scoring = one(config(), trains=False)
    assert scoring.peak < found.peak
    assert [scoring.parts()[name] for name in ("gradients", "optimizer", "activations")] == [0, 0, 0]


def test_a_larger_pack_that_is_scored_before_may_need_most() -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain, before = (one(config(model=full), scored_before=size) for size in (None, PackSize(40 * 8192, 40 * 8192)))
    assert before.peak > plain.peak
    assert before.pack.activations == 0 < plain.pack.activations


def test_a_resident_reference_stands_and_its_hidden_states_wait() -> None:
    plain, beside = (one(config(), num_microbatches=3, reference=reference) for reference in (None, LLAMA))
    assert beside.standing.reference == 2 * PARAMETERS
    assert beside.pack.activations - plain.pack.activations == 3 * 4096 * 4096 * 2


def test_layers_go_to_the_stages_that_hold_them() -> None:
    uneven = config(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=5, decoder_last_pipeline_num_layers=3)
    layer = (2 * 4096 + 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)) * 2
    weights = [found.standing.weights for found in stage_memories(LLAMA, uneven, world_size=4, pack=PACK)]
    tables = 128256 * 4096 * 2
    assert weights == [5 * layer + tables, 12 * layer, 12 * layer, 3 * layer + tables + 4096 * 2]
    sparse = dataclasses.replace(LLAMA, family="qwen3_moe", experts=Experts(8, 2, 14336, dense_layers=frozenset(range(16))))
    halves = stage_memories(sparse, config(pipeline_model_parallel_size=2), world_size=2, pack=PACK)
    assert halves[1].standing.weights > 5 * halves[0].standing.weights
    assert neediest(halves).stage == 1


def test_tied_embeddings_stand_on_the_first_and_on_the_last_stage() -> None:
    tied = dataclasses.replace(LLAMA, tied_embeddings=True)
    alone = one(config(), arch=tied).standing.weights
    table = 128256 * 4096 * 2
    assert alone == 2 * PARAMETERS - table
    staged = stage_memories(tied, config(pipeline_model_parallel_size=2), world_size=2, pack=PACK)
    assert sum(found.standing.weights for found in staged) == alone + table


def test_context_parallelism_shares_tokens_and_not_weights() -> None:
    plain, shared = one(config()), one(config(context_parallel_size=4), world_size=4)
    assert shared.standing == plain.standing
    # What attention gives is computed anew, from keys and values of the whole row that one layer gathers at a time.
    given = 32 * 8192 * 4096 * 2
    assert shared.pack.activations == (plain.pack.activations - given) / 4
    exchanged = one(config(context_parallel_size=4, cp_comm_type="a2a"), world_size=4)
    # Rotated keys and the projection's output are there no more, exchanged keys and values are.
    assert exchanged.pack.activations == (plain.pack.activations + 32 * 8192 * 2 * (1024 - (4096 + 2 * 1024))) / 4
    assert shared.pack.head < plain.pack.head / 2
    # Their optimizer is sharded over all that hold the same weights.
    sharded = one(config(context_parallel_size=4, use_distributed_optimizer=True), world_size=8)
    assert sharded.standing.optimizer == 12 * PARAMETERS / 8
    halves = config(context_parallel_size=4, use_distributed_optimizer=True, num_distributed_optimizer_instances=2)
    assert one(halves, world_size=8).standing.optimizer == 12 * PARAMETERS / 4


def test_key_value_heads_fewer_than_ranks_are_whole_on_each() -> None:
    arch = dataclasses.replace(LLAMA, num_query_groups=2)
    activations = {tp: one(config(tensor_model_parallel_size=tp), world_size=tp, arch=arch).pack.activations for tp in (2, 4)}
    # A key head of 128 channels on each, rotated; the projection's output, whole, in the place of a quarter of it.
    key, projection = 128, 4096 + 2 * 256
    more = activations[4] - activations[2] / 2
    whole = activations[2] - one(config(tensor_model_parallel_size=2), world_size=2).pack.activations
    assert whole < 0, "fewer key/value heads, less to keep"
    layer_shared = 4 * 4096 + 4 * 128
    assert more == pytest.approx(2 * 8192 * 32 * (layer_shared / 2 + key / 2 + projection * 3 / 4))


def test_optimizer_states_in_fewer_digits_and_on_the_host() -> None:
    precise = {"use_precision_aware_optimizer": True}
    shares = {"use_distributed_optimizer": True}
    # Of bf16 weights the fp32 ones hold what is missing alone.
    assert one(config(memory=precise, **shares)).standing.optimizer == (2 + 8) * PARAMETERS
    small = precise | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "main_grads_dtype": "bf16"}
    found = one(config(memory=small, **shares))
    assert (found.standing.optimizer, found.standing.gradients) == ((2 + 2 + 1) * PARAMETERS, 2 * PARAMETERS)
    for fraction in (1.0, 0.25):
        flags = precise | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
        away = one(config(memory=flags, **shares))
        assert away.standing.optimizer == (1 - fraction) * 12 * PARAMETERS
        assert away.host.total == away.host.optimizer == fraction * 16 * PARAMETERS
    saving = dataclasses.replace(config(), checkpoint=CheckpointConfig(save="x", async_save=True))
    assert one(saving).host.checkpoint == 14 * PARAMETERS


def test_modules_are_computed_anew_or_wait_on_the_host() -> None:
    plain = one(config()).pack.activations
    each = 2 * 8192 * 32
    freed = {"core_attn": 4096, "layernorm": 2 * 4096, "mlp": 3 * 14336}
    for module, elements in freed.items():
        some = one(config(model={"recompute_granularity": "selective"}, memory={"recompute_modules": [module]}))
        assert plain - some.pack.activations == each * elements, module
    both = one(config(model={"recompute_granularity": "selective"}, memory={"recompute_modules": ["layernorm", "mlp"]}))
    assert plain - both.pack.activations == each * (freed["layernorm"] + freed["mlp"])
    moved = {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm", "core_attn", "attn_proj"]}
    away = one(config(memory=moved))
    # The norm's input, rotated queries and keys, what goes into the projection.
    assert plain - away.pack.activations == away.host.activations == each * (4096 + 4096 + 1024 + 4096)


def test_attention_masks_grow_with_the_square_of_a_row() -> None:
    flex = [one(config()).pack.masks]
    flex.append(neediest(stage_memories(LLAMA, config(), world_size=1, pack=PackSize(16384, 8192))).pack.masks)
    # Four int32 tables of 64 x 64 blocks, of the packs that it remembers.
    assert flex == [32 * 4 * 4 * 64**2, 32 * 4 * 4 * 128**2]
    sdpa = config(model={"attention_backend": "sdpa"})
    pairs = PackSize(1000, 400, (Segment(300, 300, 2), Segment(100, 400, 4)))
    found = neediest(stage_memories(LLAMA, sdpa, world_size=1, pack=pairs))
    assert found.pack.masks == 4 * 100 * 400
    less = neediest(stage_memories(LLAMA, sdpa, world_size=1, pack=dataclasses.replace(pairs, segments=(Segment(1000, 1000),))))
    # Each layer's kernel keeps a mask of each response in numbers.
    assert found.pack.activations - less.pack.activations == 32 * 4 * 100 * 400 * 2


def test_a_pack_of_another_size_has_more_of_the_same_segments() -> None:
    pairs = PackSize(1000, 400, (Segment(300, 300, 2), Segment(100, 400, 4)))
    assert pairs.scaled(500) == PackSize(500, 200, (Segment(300, 300, 1), Segment(100, 400, 2)))
    assert PackSize(1000, 400).all_segments == (Segment(800, 800), Segment(200, 800))
