"""Bytes that a pack needs of a rank's memory, estimated from the model's sizes and the flags.

Counted are the tensors that autograd keeps of each layer, what the costliest layer needs while it runs, and the output layer
with its chunk of logits. What an allocator loses to fragments, and libraries and kernels to buffers of their own, is in no
figure. How far it is from what torch allocates: ``benchmarks/bench_memory.py``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

from megatron_rmipo.config.pipeline_split import stage_layers
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Family
from megatron_rmipo.families.targets import is_linear
from megatron_rmipo.families.tensors import rules_of
from megatron_rmipo.memory.attention import AttentionMemory, attention_memory
from megatron_rmipo.memory.head import head_bytes
from megatron_rmipo.memory.in_flight import packs_in_flight
from megatron_rmipo.memory.layers import Layer, backward_elements, forward_elements, scoring_elements
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.shares import Shares, trains_table
from megatron_rmipo.model.lora.numbers import Trained, trained_matrices


@dataclasses.dataclass(frozen=True)
class PackMemory:
    """Bytes that packs need on a rank.

    Attributes:
        activations: kept from forward to backward, of all packs whose backward is to come; and the hidden states of a resident
            reference.
        masks: of attention, kept for layers and packs to come.
        layer: beside them while one layer runs: what is computed anew, gradients, temporaries.
        head: beside them while the output layer runs: scored hidden states, the logits of a chunk, gradients.
        host: activations that are kept on the host.
        packs: whose activations are kept at a time, in parts of the layers of the stage.
    """

    activations: float
    masks: float
    layer: float
    head: float
    host: float = 0.0
    packs: float = 1.0

    @property
    def peak(self) -> float:
        """Most bytes of the device at one time: layers and output layer take turns."""
        return self.activations + self.masks + max(self.layer, self.head)


@dataclasses.dataclass(frozen=True)
class _LayerMemory:
    """Bytes of one layer for one pack.

    Attributes:
        kept: of the device from forward to backward, without full recomputation.
        anew: of the device where full recomputation makes all of it anew.
        running: beside what is kept, while it runs backward, or forward alone.
        host: of the host from forward to backward.
    """

    kept: float
    anew: float
    running: float
    host: float


def _layer_memory(layer: Layer, attention: AttentionMemory, window: int | None, tokens: float, *, backward: bool) -> _LayerMemory:
    each, copies = tokens * layer.shares.element_bytes, layer.adapter_copies() * layer.shares.element_bytes
    scores, recomputed = attention.kept[window], layer.recomputes("core_attn")
    if backward:
        # By the time that attention runs backward, what the MLP kept is gone.
        # Of gathered keys and values there are gradients, too.
        core = 2 * attention.piece + (scores if recomputed else 0.0) + 2 * attention.gathered - each * layer.mlp_kept()
        running = max(each * backward_elements(layer), core)
    else:
        # Scores, what becomes of them, and their softmax.
        running = max(each * forward_elements(layer), each * scoring_elements(layer) + 3 * attention.piece + attention.gathered)
    return _LayerMemory(
        kept=each * layer.kept() + (0.0 if recomputed else scores) + copies,
        anew=each * sum(part.elements for part in layer.parts()) + scores + copies,
        running=running + _restored(layer) * layer.shares.element_bytes,
        host=each * layer.offloaded(),
    )


def _restored(layer: Layer) -> float:
    """Elements of the largest matrix, where frozen ones are kept in fewer bits and made anew for each product."""
    arch = layer.arch
    if layer.config.lora.quantize_base is None:
        return 0.0
    return max(math.prod(layer.shares.matrix(arch, rule)) for rule in rules_of(arch) if is_linear(rule, arch))


def pack_memory(
    arch: ModelArchitecture,
    config: Config,
    pack: PackSize,
    *,
    backward: bool,
    stage: int = 0,
    num_microbatches: int | None = None,
    mixed: bool = False,
    fused: bool = False,
) -> PackMemory:
    """What a pass over packs of a size needs on a rank.

    Args:
        arch: the model.
        config: the run's flags.
        pack: the size.
        backward: whether the pass has a backward; without, nothing is kept.
        stage: of the pipeline, from 0.
        num_microbatches: packs of the pass; None: enough that the pipeline is full.
        mixed: logits are mixed with those of a reference in memory.
        fused: norms, SwiGLU and attention in fused kernels, as on a GPU.
    """
    parallel = config.parallel
    stages, shares = parallel.pipeline_model_parallel_size, Shares.of(arch, config)
    tokens = pack.num_tokens / shares.context
    attention = attention_memory(arch, config, pack, fused=fused)
    kinds: dict[tuple[bool, int | None, frozenset[Trained] | None], _LayerMemory] = {}
    chunks, sparse_layers = [], arch.expert_layers
    trained = trained_matrices(arch, config.lora) if config.lora.is_on else (None,) * arch.num_layers
    for chunk in stage_layers(arch.num_layers, parallel)[stage]:
        of_chunk = [(layer in sparse_layers, arch.kind_of(layer).window, trained[layer]) for layer in chunk]
        for sparse, window, some in set(of_chunk) - kinds.keys():
            layer = Layer(arch, config, fused, sparse, attention.makes_scores, some)
            kinds[sparse, window, some] = _layer_memory(layer, attention, window, tokens, backward=backward)
        chunks.append([kinds[kind] for kind in of_chunk])
    last = stage == stages - 1
    # Under sequence parallelism hidden states are gathered into a buffer that stays.
    buffer = tokens * arch.hidden_size * shares.element_bytes if shares.sequence > 1 else 0.0
    head = buffer + head_bytes(arch, config, pack, backward=backward, mixed=mixed, fused=fused) if last else 0.0
    running = buffer + max((one.running for one in kinds.values()), default=0.0)
    # A reference's hidden states of all packs wait for the pass.
    waiting = pack.num_scored / shares.context * arch.hidden_size * shares.element_bytes * (num_microbatches or 1)
    beside = waiting if mixed and last else 0.0
    if not backward:
        return PackMemory(beside, attention.masks, running, head)
    inputs = tokens * arch.hidden_size / shares.sequence * shares.element_bytes
    kept = [_kept_of_chunk(chunk, config.model, inputs) for chunk in chunks]
    if stages > 1:
        # What goes to the next stage stays until the backward pass comes back.
        kept = [one + inputs * (not last or number < len(chunks) - 1) for number, one in enumerate(kept)]
    held = max(
        packs_in_flight(stage, stages, len(chunks), num_microbatches),
        key=lambda counts: sum(map(operator.mul, counts, kept)),
    )
    # The gradient of the embedding is a table; by then the first chunk of its pack keeps nothing more.
    embeds = stage == 0 and trains_table(arch, config, Family.embedding)
    table = shares.vocabulary * arch.hidden_size * shares.element_bytes - kept[0] if embeds else 0.0
    return PackMemory(
        beside + sum(map(operator.mul, held, kept)),
        attention.masks,
        max(running + max(_anew(chunk, config.model) for chunk in chunks), table),
        head,
        host=sum(count * sum(one.host for one in chunk) for count, chunk in zip(held, chunks, strict=True)),
        packs=sum(held) / len(chunks),
    )


def _kept_of_chunk(chunk: Sequence[_LayerMemory], model: ModelConfig, inputs: float) -> float:
    """Bytes of the device that a pack keeps of the layers of a chunk; ``inputs`` of them are those of a layer."""
    number = model.recompute_num_layers or 1
    if model.recompute_granularity != "full":
        return sum(one.kept for one in chunk)
    if model.recompute_method == "block":
        return min(number, len(chunk)) * inputs + sum(one.kept for one in chunk[number:])
    return -(-len(chunk) // number) * inputs


def _anew(chunk: Sequence[_LayerMemory], model: ModelConfig) -> float:
    """Bytes of the layers that full recomputation makes anew at a time, at most."""
    number = model.recompute_num_layers or 1
    if model.recompute_granularity != "full":
        return 0.0
    if model.recompute_method == "block":
        # One at a time; layers that were kept are gone by then.
        return max(0.0, max((one.anew for one in chunk[:number]), default=0.0) - sum(one.kept for one in chunk[number:]))
    groups = [chunk[first : first + number] for first in range(0, len(chunk), number)]
    return max((sum(one.anew for one in group) for group in groups), default=0.0)
