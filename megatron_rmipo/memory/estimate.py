"""Bytes of a rank's memory, estimated from the model's sizes and the flags: what stands, and what a pack needs besides.

Counted are the tensors that autograd keeps of each layer, what the costliest layer needs while it runs, and the output layer
with its chunk of logits. On the CPU, where tests measure it, the estimate of a pack is within a seventh of what torch
allocates; on a GPU it was not measured, nor for latent attention. Scores that soft caps or sinks have the CPU keep, and what a
clamped activation keeps, are not counted: there (gpt-oss) it falls about a fifth short. What an allocator loses to fragments,
and libraries and kernels to buffers of their own, is in no figure.

Shape letters: T tokens of a pack, N scored tokens, H hidden, F MLP channels, A query channels, K key (or value) channels, D
channels of a head, C vocabulary entries of a chunk, tp tensor-parallel size.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.config.parallel_flags import ParallelConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.families.tensors import layer_parameters
from megatron_rmipo.model.expert_problems import expert_tensor_size

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class PackSize:
    """A pack as memory sees it.

    Attributes:
        num_tokens: T, padding included.
        num_scored: N.
    """

    num_tokens: int
    num_scored: int


@dataclasses.dataclass(frozen=True)
class PackMemory:
    """Bytes that one pack needs on a rank.

    Attributes:
        activations: kept from forward to backward.
        layer: beside them while one layer runs: what is computed anew, gradients, temporaries.
        head: beside them while the output layer runs: scored hidden states, the logits of a chunk, gradients.
    """

    activations: float
    layer: float
    head: float

    @property
    def peak(self) -> float:
        """Most bytes at one time: layers and output layer take turns."""
        return self.activations + max(self.layer, self.head)


@dataclasses.dataclass(frozen=True)
class StandingMemory:
    """Bytes that a rank holds whatever the batch.

    Attributes:
        weights: in the dtype that is computed in.
        gradients: DDP's buffer, fp32.
        master_weights: the optimizer's fp32 weights, where it does not update the others themselves; from when it is built.
        moments: Adam's two, fp32; from the first update, or from when a checkpoint is loaded.
    """

    weights: float
    gradients: float = 0.0
    master_weights: float = 0.0
    moments: float = 0.0

    @property
    def optimizer(self) -> float:
        """Bytes of what the optimizer holds."""
        return self.master_weights + self.moments

    @property
    def total(self) -> float:
        """Bytes of all of them."""
        return self.weights + self.gradients + self.optimizer


def standing_memory(arch: ModelArchitecture, config: Config, dp_size: int, *, trains: bool = True) -> StandingMemory:
    """What the policy holds on the rank that holds most of it: its shard of the layers and of the vocabulary.

    Args:
        arch: the model.
        config: the run's flags.
        dp_size: data-parallel ranks.
        trains: False where there are weights alone, as for scoring.
    """
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    vocabulary = padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by, tp) * arch.hidden_size / tp
    # The first stage embeds, the last one scores.
    tables = 2 if pp == 1 and not arch.tied_embeddings else 1
    dense, expert = _stage_layer_parameters(arch, config.parallel)
    dense += tables * vocabulary
    parameters = dense + expert
    weights = parameters * _element_bytes(config)
    if not trains:
        return StandingMemory(weights)
    share = parameters * FP32_BYTES
    if config.parallel.use_distributed_optimizer:
        # Ranks that hold the same experts are fewer than those that hold the same of the rest.
        expert_dp_size = dp_size * tp / _expert_ranks(config.parallel)
        share = (dense / dp_size + expert / expert_dp_size) * FP32_BYTES
    return StandingMemory(
        weights,
        gradients=parameters * FP32_BYTES,
        master_weights=share if config.model.bf16 else 0.0,
        moments=2 * share,
    )


def _stage_layer_parameters(arch: ModelArchitecture, parallel: ParallelConfig) -> tuple[float, float]:
    """Numbers in a rank's shard of the layers, on the stage that has most: without experts, in experts."""
    layers = [
        (
            counts.cut / parallel.tensor_model_parallel_size + counts.whole,
            counts.num_experts * counts.expert / _expert_ranks(parallel),
        )
        for counts in (layer_parameters(arch, layer) for layer in range(arch.num_layers))
    ]
    per_stage = max(1, arch.num_layers // parallel.pipeline_model_parallel_size)
    stages = [layers[first : first + per_stage] for first in range(0, arch.num_layers, per_stage)]
    totals = [(sum(dense for dense, _ in stage), sum(expert for _, expert in stage)) for stage in stages]
    return max(totals, key=sum)


def _expert_ranks(parallel: ParallelConfig) -> int:
    """Ranks that the experts of a layer are spread over."""
    return parallel.expert_model_parallel_size * expert_tensor_size(parallel)


def pack_memory(
    arch: ModelArchitecture,
    config: Config,
    pack: PackSize,
    *,
    backward: bool,
    packs_in_flight: int = 1,
    mixed: bool = False,
    fused: bool = False,
    last_stage: bool = True,
) -> PackMemory:
    """What a pack needs on one rank.

    Args:
        arch: the model.
        config: the run's flags.
        pack: its size.
        backward: whether the pass has a backward; without, nothing is kept.
        packs_in_flight: packs whose activations are kept at a time: one, but for pipeline stages before the last.
        mixed: logits are mixed with those of a reference in memory.
        fused: norms, SwiGLU and attention in fused kernels, as on a GPU.
        last_stage: whether the rank's pipeline stage has the output layer.
    """
    element = _element_bytes(config)
    tokens = pack.num_tokens * element
    whole_layer = tokens * _layer_elements(arch, config, fused=fused)
    working = tokens * _working_elements(arch, config)
    head = _head_bytes(arch, config, pack, backward=backward, mixed=mixed, fused=fused) if last_stage else 0.0
    if not backward:
        return PackMemory(0.0, layer=tokens * _forward_elements(arch, config, fused=fused), head=head)
    num_layers = arch.num_layers / config.parallel.pipeline_model_parallel_size
    model = config.model
    if model.recompute_granularity != "full":
        return PackMemory(packs_in_flight * num_layers * whole_layer, working, head)
    inputs = tokens * arch.hidden_size / _sequence_shards(config)
    per_checkpoint = model.recompute_num_layers or 1
    if model.recompute_method == "block":
        recomputed = min(per_checkpoint, num_layers)
        kept = recomputed * inputs + (num_layers - recomputed) * whole_layer
        # Layers that were kept are gone by the time that one is computed anew.
        anew = whole_layer if recomputed == num_layers else 0.0
    else:
        kept, anew = num_layers / per_checkpoint * inputs, min(per_checkpoint, num_layers) * whole_layer
    return PackMemory(packs_in_flight * kept, anew + working, head)


def _element_bytes(config: Config) -> int:
    return 2 if config.model.bf16 else FP32_BYTES


def _sequence_shards(config: Config) -> int:
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def _layer_elements(arch: ModelArchitecture, config: Config, *, fused: bool) -> float:
    """Elements per token that autograd keeps of one layer of a rank, without full recomputation."""
    tp = config.parallel.tensor_model_parallel_size
    # The residual stream twice; what comes of the norms before attention and MLP, and what goes into those after.
    norms = arch.pre_norm + arch.post_norm
    hidden = (2 + 2 * norms) * arch.hidden_size / _sequence_shards(config)
    if not fused:
        # What torch's norm in parts keeps, in fp32.
        parts = 3 if config.model.bf16 else 2
        hidden += norms * parts * arch.hidden_size * FP32_BYTES / _element_bytes(config) / _sequence_shards(config)
    # The projection's output, which holds the values; rotated queries and keys; their cosines and sines; what goes on.
    attention = (3 * arch.query_size + 3 * arch.key_size) / tp + 4 * arch.kv_channels
    if config.model.recompute_granularity != "selective":
        # The attention's own output, and the keys and values of a shared prompt, once more for the second response.
        attention += (arch.query_size + (0 if fused else 2 * arch.key_size)) / tp
    attention += _qk_norm_elements(arch, config, fused=fused)
    if arch.latent is not None:
        # Latents, before their norms and after, on every rank.
        attention += 2 * (arch.latent.q_lora_rank or 0) + 2 * arch.latent.key_value_down_size
    return hidden + attention + _mlp_elements(arch, config, fused=fused)


def _qk_norm_elements(arch: ModelArchitecture, config: Config, *, fused: bool) -> float:
    """Elements per token that autograd keeps of a layer's norms of queries and keys."""
    if not arch.qk_norm and not arch.qk_norm_whole:
        return 0.0
    both = arch.query_size + arch.key_size
    if arch.qk_norm_whole:
        # In fp32, what goes in and what comes of it, before its weight; it has no fused kernel.
        kept: float = 2 * both * FP32_BYTES / _element_bytes(config)
    elif fused:
        kept = both
    elif config.model.bf16:
        # In fp32, what goes in and what comes of it.
        kept = 2 * both * FP32_BYTES / _element_bytes(config)
    else:
        # What comes of it; and what goes in, which of the keys is the projection's output itself.
        kept = both + arch.query_size
    return kept / config.parallel.tensor_model_parallel_size


def _mlp_elements(arch: ModelArchitecture, config: Config, *, fused: bool) -> float:
    """Elements per token that autograd keeps of a layer's MLP, or of its experts: mean over the layers."""
    # Gate and up, and their product; in parts also what goes into it.
    each, tp = 3 if fused else 5, config.parallel.tensor_model_parallel_size
    dense = each * arch.ffn_hidden_size / tp
    experts = arch.experts
    if experts is None:
        return dense
    # The product is weighted, in parts one tensor more. Routers keep tables of the experts, in fp32.
    weighted = (each if fused else each + 1) * experts.per_token * experts.ffn_hidden_size / tp
    tables = 4 * experts.num_experts * FP32_BYTES / _element_bytes(config) / _sequence_shards(config)
    sparse = each * experts.shared_ffn_hidden_size / tp + weighted + _sent_elements(arch, config.parallel) + tables
    share = len(arch.expert_layers) / arch.num_layers
    return share * sparse + (1 - share) * dense


def _sent_elements(arch: ModelArchitecture, parallel: ParallelConfig) -> float:
    """Elements per token of a copy for each expert that it goes through, where these are as busy as each other."""
    assert arch.experts is not None
    return arch.experts.per_token * arch.hidden_size * expert_tensor_size(parallel) / parallel.tensor_model_parallel_size


def _running_elements(arch: ModelArchitecture, config: Config, *, copies: float, each: float) -> float:
    """Elements per token that a layer of experts holds while these run, one after the other."""
    experts, tp = arch.experts, config.parallel.tensor_model_parallel_size
    assert experts is not None
    one = each * experts.per_token * experts.ffn_hidden_size / experts.num_experts / tp
    tables = 4 * experts.num_experts * FP32_BYTES / _element_bytes(config) / _sequence_shards(config)
    return copies * _sent_elements(arch, config.parallel) + one + tables


def _working_elements(arch: ModelArchitecture, config: Config) -> float:
    """Elements per token that the backward of a layer needs beside what was kept: the MLP's gradients weigh most."""
    tp = config.parallel.tensor_model_parallel_size
    dense = 2 * arch.ffn_hidden_size / tp if arch.dense_layers else 0.0
    sparse = _running_elements(arch, config, copies=2, each=2) if arch.experts else 0.0
    return max(dense, sparse) + arch.hidden_size / _sequence_shards(config)


def _forward_elements(arch: ModelArchitecture, config: Config, *, fused: bool) -> float:
    """Elements per token that a layer holds at most in a forward-only pass."""
    each = 3 if fused else 5
    mlp = each * arch.ffn_hidden_size / config.parallel.tensor_model_parallel_size if arch.dense_layers else 0.0
    # Tokens sorted, and what comes of each expert; part of them twice, when it is put together.
    mixture = _running_elements(arch, config, copies=3.5, each=each) if arch.experts else 0.0
    working = max(_attention_elements(arch, config, fused=fused), mlp, mixture)
    return 4 * arch.hidden_size / _sequence_shards(config) + working


def _attention_elements(arch: ModelArchitecture, config: Config, *, fused: bool) -> float:
    """Elements per token that a layer's attention holds while it norms or rotates queries: the most of it, with large heads."""
    queries, keys = arch.query_size, arch.key_size
    rotating = (1 if fused else 3) * queries + (arch.qk_norm or arch.qk_norm_whole) * keys
    in_parts = arch.qk_norm_whole or (arch.qk_norm and not fused)
    norming = 3 * queries * FP32_BYTES / _element_bytes(config) if in_parts else 0.0
    # The projection's output and the queries out of it; angles, cosines and sines.
    return (2 * queries + 2 * keys + max(rotating, norming)) / config.parallel.tensor_model_parallel_size + 3 * arch.kv_channels


def _head_bytes(arch: ModelArchitecture, config: Config, pack: PackSize, *, backward: bool, mixed: bool, fused: bool) -> float:
    """Final norm, scored hidden states, a chunk's logits and their gradients, of the last stage."""
    tp, element = config.parallel.tensor_model_parallel_size, _element_bytes(config)
    shard = padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by, tp) // tp
    rows = min(config.model.logprob_chunk_size, shard)
    logits = pack.num_scored * rows
    # Of bf16 products that are wanted in fp32 a CPU makes bf16 ones first.
    half = element != FP32_BYTES
    rounded = element if half and not fused else 0
    states = pack.num_tokens * arch.hidden_size * element + pack.num_scored * arch.hidden_size * element
    # One chunk at a time. Mixed: both models' and a mixture.
    forward = states + logits * ((3 if mixed else 1) * FP32_BYTES + rounded)
    if not backward:
        return forward
    states += 3 * pack.num_tokens * arch.hidden_size * element + pack.num_scored * arch.hidden_size * FP32_BYTES
    chunk = logits * (FP32_BYTES + (element if half else 0))
    # In bf16 what is added to fp32 gradients, of the hidden states or of the weight, is a tensor of its own.
    product = max(pack.num_scored, rows) * arch.hidden_size * (FP32_BYTES + rounded) if half else 0
    return max(forward, states + chunk + product)
