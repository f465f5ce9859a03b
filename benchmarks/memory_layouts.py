"""Small models at the layouts whose estimated memory is held against what is allocated, and how that is counted.

Standing memory is the bytes of all tensors that are there after an update and were not before the model; a pass's memory is the
peak of torch's allocations during it, above what was allocated before.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.inputs import Pairs, random_pairs
from benchmarks.measure import peak_bytes
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.families.architecture import Experts, LatentAttention, LayerKind, ModelArchitecture, Rope
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.stages import StageMemory, stage_memories
from megatron_rmipo.model.attention.sdpa import _kept_band_mask
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.lora.attach import add_adapters
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.lora.switch import AdapterView
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.passes.step_passes import gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime
from megatron_rmipo.training.setup import build_training_state

_LLAMA = ModelArchitecture("llama", 4, 128, 344, 8, 4, 16, 1000, 4096, (Rope(1e4),), 1e-5)
_SHARED: Mapping[str, Any] = {
    "family": "glm4_moe",
    "experts": Experts(8, 2, 96, dense_layers=frozenset({0}), shared_ffn_hidden_size=80),
}
_GPT_OSS: Mapping[str, Any] = {
    "family": "gpt_oss",
    "activation": "clamped_swiglu",
    "activation_limit": 7.0,
    "attention_sinks": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "experts": Experts(8, 2, 96, bias=True, router_bias=True),
    "layer_kinds": (LayerKind(window=64), LayerKind()) * 2,
}
_LATENT: Mapping[str, Any] = {
    "family": "deepseek_v2",
    "num_query_groups": 8,
    "kv_channels": 24,
    "rotary_channels": 8,
    "latent": LatentAttention(48, 32, 16, 8, 16),
}
# Prompt, chosen, rejected.
_LENGTHS = ((101, 71, 53), (31, 123, 83), (150, 23, 47), (64, 90, 90))


@dataclasses.dataclass(frozen=True)
class MemoryLayout:
    """A model, flags and pairs.

    Attributes:
        name: of the layout.
        ranks: that it takes.
        parallel, model, memory, lora: flags of these sections.
        arch: what of the model is not the small Llama's.
        lengths: of the pairs that every data-parallel rank has.
        objective: whose gradient pass is measured.
    """

    name: str
    ranks: int = 1
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lengths: Sequence[tuple[int, int, int]] = _LENGTHS
    objective: str = "simpo"

    @property
    def architecture(self) -> ModelArchitecture:
        """The model."""
        return dataclasses.replace(_LLAMA, **self.arch)

    @property
    def config(self) -> Config:
        """The flags. Packs hold as many tokens as the first pair has, or all pairs where there are no pipeline stages."""
        model = {"make_vocab_size_divisible_by": 8, "logprob_chunk_size": 256, **self.model}
        whole = self.parallel.get("pipeline_model_parallel_size", 1) == 1
        tokens = sum(map(sum, self.lengths)) if whole else max(map(sum, self.lengths))
        return Config(
            parallel=ParallelConfig(**self.parallel),
            model=ModelConfig(**model),
            memory=MemoryConfig(**self.memory),
            lora=LoraConfig(**self.lora),
            data=DataConfig(tokens_per_microbatch=tokens + tokens % 2, min_microbatches_per_stage=0),
            optimizer=OptimizerConfig(lr=1e-3),
        )

    def pairs(self) -> Pairs:
        """Random tokens of the lengths, for each data-parallel rank the same."""
        lengths = np.repeat(np.array(self.lengths), self.ranks, axis=0)
        return random_pairs(lengths, _LLAMA.vocab_size, np.random.default_rng(3))


_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_SELECTIVE = {"recompute_granularity": "selective"}
_MODULES = {"recompute_modules": ["core_attn", "layernorm", "mlp"]}
_PRECISE = {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16", "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}
_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_PP2 = {"pipeline_model_parallel_size": 2}
_CP2 = {"context_parallel_size": 2}
_LORA = {"lora_rank": 8}
_SOME_LORA = {"lora_rank": 8, "lora_target_modules": ["q_proj", "down_proj"], "lora_modules_to_save": ["o_proj", "lm_head"]}
_LONG = ((700, 411, 333),)
# Pairs as large as each other, so that packs are.
_EQUAL = ((100, 71, 73),) * 6
LAYOUTS = (
    MemoryLayout("one rank"),
    MemoryLayout("one rank, bf16", model={"bf16": True}),
    MemoryLayout("selective recomputation, a long pair", model=_SELECTIVE, lengths=_LONG),
    MemoryLayout("full recomputation, odd packs", model=_FULL, lengths=((77, 31, 9), (5, 3, 2), (201, 77, 130))),
    MemoryLayout("full recomputation, bf16", model=_FULL | {"bf16": True}),
    MemoryLayout(
        "tied embeddings, large vocabulary",
        arch={"tied_embeddings": True, "vocab_size": 6000},
        model={"logprob_chunk_size": 4096},
    ),
    MemoryLayout("gpt-oss: sinks, windows, clamped experts", arch=_GPT_OSS),
    MemoryLayout("gpt-oss, bf16, a long pair", arch=_GPT_OSS, model={"bf16": True}, lengths=((600, 300, 333),)),
    MemoryLayout(
        "Gemma 2: soft caps", arch={"family": "gemma2", "attention_softcap": 50.0, "logit_softcap": 30.0, "post_norm": True}
    ),
    MemoryLayout("latent attention", arch=_LATENT),
    MemoryLayout("latent attention, bf16", arch=_LATENT, model={"bf16": True}),
    MemoryLayout("resident reference", objective="epsilon_dpo"),
    MemoryLayout("TP 2, sequence parallel", 2, _TP2),
    MemoryLayout("TP 2", 2, {"tensor_model_parallel_size": 2}),
    MemoryLayout("PP 2", 2, _PP2, lengths=_EQUAL),
    MemoryLayout("PP 2, full recomputation, bf16", 2, _PP2, _FULL | {"bf16": True}, lengths=_EQUAL),
    MemoryLayout("DP 2, distributed optimizer, bf16", 2, {"use_distributed_optimizer": True}, {"bf16": True}),
    MemoryLayout("EP 2, experts", 2, {"expert_model_parallel_size": 2}, arch=_SHARED),
    MemoryLayout(
        "EP 2, TP 2, sequence parallel, bf16",
        2,
        _TP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"bf16": True},
        arch=_SHARED,
    ),
    MemoryLayout(
        "PP 2, dense and expert layers",
        2,
        _PP2,
        arch={"family": "qwen3_moe", "experts": Experts(8, 2, 96, dense_layers=frozenset({0, 1}))},
        lengths=_EQUAL,
    ),
    MemoryLayout("CP 2", 2, _CP2),
    MemoryLayout("CP 2, heads exchanged, bf16, a long pair", 2, _CP2 | {"cp_comm_type": "a2a"}, {"bf16": True}, lengths=_LONG),
    MemoryLayout("CP 2, full recomputation, bf16, a long pair", 2, _CP2, _FULL | {"bf16": True}, lengths=_LONG),
    MemoryLayout("PP 2, VPP 2", 2, _PP2 | {"num_layers_per_virtual_pipeline_stage": 1}, lengths=_EQUAL),
    MemoryLayout("PP 2, 3 and 1 layers, bf16", 2, _PP2 | {"decoder_last_pipeline_num_layers": 1}, {"bf16": True}, lengths=_EQUAL),
    MemoryLayout("TP 2, one key/value head, sequence parallel", 2, _TP2, arch={"num_query_groups": 1}),
    MemoryLayout("selective recomputation of attention, norms and MLP, bf16", 1, {}, _SELECTIVE | {"bf16": True}, _MODULES),
    MemoryLayout("DP 2, precision-aware optimizer, fp8, fp16", 2, {"use_distributed_optimizer": True}, {"bf16": True}, _PRECISE),
    MemoryLayout("LoRA, one rank", lora=_LORA),
    MemoryLayout("LoRA, one rank, bf16", model={"bf16": True}, lora=_LORA),
    MemoryLayout("LoRA, full recomputation, bf16", model=_FULL | {"bf16": True}, lora=_LORA),
    MemoryLayout("LoRA of some modules, others whole, bf16", model={"bf16": True}, lora=_SOME_LORA),
    MemoryLayout("LoRA, the reference without it", lora=_LORA, objective="epsilon_dpo"),
    MemoryLayout("LoRA, TP 2, sequence parallel, bf16", 2, _TP2, {"bf16": True}, lora=_LORA),
    MemoryLayout("LoRA, PP 2", 2, _PP2, lora=_LORA, lengths=_EQUAL),
    MemoryLayout(
        "LoRA, EP 2, experts, distributed optimizer",
        2,
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
        lora=_LORA,
        arch=_SHARED,
    ),
)


@dataclasses.dataclass(frozen=True)
class Counted:
    """What one rank was found to need.

    Attributes:
        stage: its pipeline stage.
        standing: bytes after an update.
        peak: bytes of the gradient pass beside them.
        pack: the largest of its packs.
        num_packs: of the pass.
    """

    stage: int
    standing: int
    peak: int
    pack: PackSize
    num_packs: int


def count_layouts(layouts: Sequence[MemoryLayout]) -> list[Counted]:
    """What this rank needs at each of the layouts, one after the other. All ranks of the world call it together."""
    return [_count(layout) for layout in layouts]


def _count(layout: MemoryLayout) -> Counted:
    config, arch = layout.config, layout.architecture
    groups = start(config)
    before = live_bytes()
    model = build_model(arch, config, groups)
    if config.lora.is_on:
        add_adapters(model, arch, {ADAPTER: plan_of_flags(arch, config.lora)}, groups, seed=0)
    objective, reference = build_objective(layout.objective, {}), None
    if objective.needs.perturbation is not None:
        reference = AdapterView(model, None) if config.lora.is_on else build_model(arch, config, groups)
    state = build_training_state(model, config, groups, train_iters=9)
    lengths = conditional_layout(config, arch, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    pairs = layout.pairs()
    batch = BatchBuilder(PairCollection([pairs]), lengths).build(np.arange(len(pairs)))  # type: ignore[list-item]
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups, reference)
    state.model.zero_grad_buffer()
    state.model.train()
    _kept_band_mask.cache_clear()
    peak = peak_bytes(lambda: gradient_pass(state.model, batch, objective, prepared, groups))
    state.optimizer.step()
    state.optimizer.zero_grad()
    _kept_band_mask.cache_clear()
    largest = max(batch.conditional, key=lambda row: row.num_tokens)
    stage = groups.pp_rank
    dist.barrier()
    # Megatron's buffer for gathered tensors, which the pass has made, goes with the groups.
    parallel_state.destroy_model_parallel()
    return Counted(stage, live_bytes() - before, peak, PackSize.of_row(largest), len(batch.conditional))


def start(config: Config) -> ProcessGroups:
    """The groups of a layout."""
    return initialize_runtime(**config.parallel.runtime_arguments())


def live_bytes() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def estimated(layout: MemoryLayout, counted: Counted) -> StageMemory:
    """What the estimate says of the rank."""
    mixed = build_objective(layout.objective, {}).needs.perturbation is not None
    return stage_memories(
        layout.architecture,
        layout.config,
        world_size=layout.ranks,
        pack=counted.pack,
        num_microbatches=counted.num_packs,
        reference=layout.architecture if mixed else None,
        fused=False,
    )[counted.stage]
