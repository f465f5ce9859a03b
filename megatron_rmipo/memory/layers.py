"""Elements that a layer keeps of each token for its backward pass, and what it holds while it runs.

Counted in the dtype that is computed in, for one token of a rank: of a row that context-parallel ranks share, its own tokens.

Shape letters: T tokens, H hidden, F MLP channels, D channels of a head, tp tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.shares import FP32_BYTES, Shares
from megatron_rmipo.model.lora.numbers import Trained


class Part(NamedTuple):
    """Something that a layer keeps.

    Attributes:
        elements: of a token.
        recomputed_with: modules of ``--recompute-modules`` each of which keeps it no longer.
        offloaded_with: the module of ``--offload-modules`` that keeps it on the host.
    """

    elements: float
    recomputed_with: tuple[str, ...] = ()
    offloaded_with: str | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of layer on a rank.

    Attributes:
        arch: the model.
        config: the flags.
        fused: norms, SwiGLU and attention in fused kernels, as on a GPU.
        sparse: it has experts in the place of the MLP.
        makes_scores: its attention's scores are made outside of kernels.
        trained: matrices that have an adapter, or are trained beside one; None where there is none, and all are.
    """

    arch: ModelArchitecture
    config: Config
    fused: bool
    sparse: bool
    makes_scores: bool = False
    trained: frozenset[Trained] | None = None

    def keeps_input(self, *names: str) -> bool:
        """Whether one of the matrices, called by Megatron's names behind ``layers.``, needs its input in the backward pass."""
        return self.trained is None or any(
            one.rule.megatron == f"decoder.layers.{name}.weight" for one in self.trained for name in names
        )

    @property
    def norm_inside(self) -> float:
        """What torch's norm in parts keeps for each of its channels, in fp32; of a frozen one nothing for its weight."""
        if self.fused:
            return 0.0
        return ((1.5 if self.trained is None else 1.0) if self.config.model.bf16 else float(self.trained is None)) * self.fp32

    def adapter_copies(self) -> float:
        """Elements, of no token, in what adapters multiply with: A and B in the dtype that is computed in, B with its zeros."""
        return sum(_adapter_elements(self, one) for one in self.trained or ())

    @functools.cached_property
    def shares(self) -> Shares:
        """Sizes of the groups that share it."""
        return Shares.of(self.arch, self.config)

    @property
    def fp32(self) -> float:
        """Elements that a number in fp32 takes."""
        return FP32_BYTES / self.shares.element_bytes

    def kept(self) -> float:
        """Elements of a token that stay on the device until the backward pass."""
        return self._on_device(self.parts())

    def offloaded(self) -> float:
        """Elements of a token that lie on the host until then."""
        return sum(part.elements for part in self.parts() if self._is_kept(part) and self._is_offloaded(part))

    def recomputed(self) -> float:
        """Elements of a token that selective recomputation makes anew at a time: norms, and the largest of other modules."""
        anew: dict[str, float] = {}
        for part in self.parts():
            for module in self._recompute_modules.intersection(part.recomputed_with):
                anew[module] = anew.get(module, 0.0) + part.elements
        # Norms are made anew before the module that they feed, and stay while it runs backward.
        return anew.pop("layernorm", 0.0) + max(anew.values(), default=0.0)

    def parts(self) -> Iterator[Part]:
        """Whatever it keeps with nothing recomputed."""
        yield from _hidden_parts(self)
        yield from _latent_parts(self) if self.arch.latent else _projection_parts(self)
        # Where scores are kept, so are copies of what they are made of; both are counted by what attends to what.
        if not self.makes_scores or self.recomputes("core_attn"):
            yield from _core_parts(self)
        if self.keeps_input("self_attention.linear_proj"):
            yield Part(self.arch.context_size / self.shares.tensor, offloaded_with="attn_proj")
        yield from self._mlp_parts()

    def mlp_kept(self) -> float:
        """Elements of a token that its MLP, or its experts, keep on the device."""
        return self._on_device(self._mlp_parts())

    def _mlp_parts(self) -> Iterator[Part]:
        return _sparse_parts(self) if self.sparse else _dense_parts(self)

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation makes a module's work anew."""
        return module in self._recompute_modules

    @property
    def _recompute_modules(self) -> frozenset[str]:
        if self.config.model.recompute_granularity != "selective":
            return frozenset()
        return frozenset(self.config.memory.recompute_modules or ["core_attn"])

    def _on_device(self, parts: Iterator[Part]) -> float:
        return sum(part.elements for part in parts if self._is_kept(part) and not self._is_offloaded(part))

    def _is_kept(self, part: Part) -> bool:
        return self._recompute_modules.isdisjoint(part.recomputed_with)

    def _is_offloaded(self, part: Part) -> bool:
        memory = self.config.memory
        return memory.fine_grained_activation_offloading and part.offloaded_with in (memory.offload_modules or [])


# What multiplies the normed hidden states.
_ATTENTION_INPUTS = tuple(f"self_attention.linear_{name}" for name in ("qkv", "q_proj", "q_down_proj", "kv_down_proj"))
_MLP_INPUTS = ("mlp.linear_fc1", "mlp.shared_experts.linear_fc1")


def _adapter_elements(layer: Layer, one: Trained) -> float:
    arch, shares = layer.arch, layer.shares
    each = one.num_parts * (layer.config.lora.lora_rank or 0) * sum(shares.matrix(arch, one.rule))
    return (
        each * arch.experts.num_experts * shares.expert_tensor / shares.experts if one.rule.per_expert and arch.experts else each
    )


def _hidden_parts(layer: Layer) -> Iterator[Part]:
    """The residual stream, norms."""
    arch, shares = layer.arch, layer.shares
    hidden = arch.hidden_size / shares.sequence
    yield Part(hidden, offloaded_with="attn_norm")
    yield Part(hidden, offloaded_with="mlp_norm")
    inside = hidden * layer.norm_inside
    if arch.pre_norm:
        yield Part(hidden * layer.keeps_input(*_ATTENTION_INPUTS) + inside, ("layernorm",), "qkv_linear")
        # Of a layer that is computed anew from its MLP on, this is what it is computed from.
        yield Part(hidden * layer.keeps_input(*_MLP_INPUTS) + inside, ("layernorm",))
    if arch.post_norm:
        yield Part(2 * (hidden + inside))
    for one in layer.trained or ():
        # A x, of all tokens where the rank has some rows of B, or of its own tokens.
        part = 1 if one.rule.is_cut and not one.rule.cuts_columns else shares.sequence
        times = arch.experts.per_token if one.rule.per_expert and arch.experts else 1
        yield Part(times * one.num_parts * (layer.config.lora.lora_rank or 0) / part)


def _projection_parts(layer: Layer) -> Iterator[Part]:
    """Queries; cosines and sines of queries and keys; their norms."""
    yield Part(layer.shares.queries, offloaded_with="core_attn")
    yield Part(4 * layer.arch.kv_channels)
    yield Part(_query_key_norm_elements(layer))


def _latent_parts(layer: Layer) -> Iterator[Part]:
    """Latents, before their norms and after, on every rank; cosines and sines."""
    latent = layer.arch.latent
    assert latent is not None
    for name, size in (("q", latent.q_lora_rank or 0), ("kv", latent.key_value_down_size)):
        yield Part((1 + layer.keeps_input(f"self_attention.linear_{name}_up_proj") + layer.norm_inside) * size)
    yield Part(4 * latent.qk_rope_head_dim)


def _core_parts(layer: Layer) -> Iterator[Part]:
    """What goes into the core of attention beside queries, and what comes out."""
    arch, shares = layer.arch, layer.shares
    context, queries = arch.context_size / shares.tensor, arch.query_size / shares.tensor
    keys, values = (shares.keys, shares.keys) if arch.latent is None else (queries, context)
    exchanges = shares.context > 1 and layer.config.parallel.cp_comm_type == "a2a"
    if arch.latent is not None:
        yield Part(queries + keys + values, ("mla_up_proj",), "core_attn")
    elif exchanges:
        # Some heads of the whole row in the place of all heads of a rank's tokens.
        yield Part(keys + values, offloaded_with="core_attn")
    else:
        # The projection's output holds the values; where key/value heads are fewer than ranks, each gathers all of it.
        whole = shares.tensor if shares.tensor > arch.num_query_groups else 1
        yield Part((arch.query_size + 2 * arch.key_size) * whole / shares.tensor)
        yield Part(keys, offloaded_with="core_attn")
    # Gathered keys and values, and what is made of them, are computed anew.
    if shares.context == 1 or exchanges:
        # A shared prompt's keys and values once more for the second response.
        yield Part(context + (0 if layer.fused else keys + values), ("core_attn",))


def _query_key_norm_elements(layer: Layer) -> float:
    arch, shares = layer.arch, layer.shares
    if not arch.qk_norm and not arch.qk_norm_whole:
        return 0.0
    both = shares.queries + shares.keys
    if arch.qk_norm_whole or (layer.config.model.bf16 and not layer.fused):
        # In fp32, what goes in and what comes of it; of the whole norm, which has no fused kernel, before its weight.
        return 2 * both * layer.fp32
    # What comes of it; in parts also what goes in, which of the keys is the projection's output itself.
    return both if layer.fused else both + shares.queries


def _dense_parts(layer: Layer) -> Iterator[Part]:
    width = _gated_width(layer) - (not layer.keeps_input("mlp.linear_fc2"))
    yield Part(width * layer.arch.ffn_hidden_size / layer.shares.tensor, ("mlp",))


def _gated_width(layer: Layer) -> int:
    """Tensors of F channels that a gated MLP keeps: gate and up, and their product; in parts also what goes into it."""
    if layer.arch.activation == "clamped_swiglu":
        # Before it is clamped and after; it has no fused kernel.
        return 7
    # The one there is makes silu.
    return 3 if layer.fused and layer.arch.activation == "silu" else 5


def _sparse_parts(layer: Layer) -> Iterator[Part]:
    experts, shares = layer.arch.experts, layer.shares
    assert experts is not None
    each = _gated_width(layer)
    channels = experts.per_token * experts.ffn_hidden_size / shares.tensor
    # The product is weighted, in parts one tensor more.
    if layer.keeps_input("mlp.experts.experts.linear_fc1"):
        yield Part(sent_elements(layer), ("moe",), "expert_fc1")
    yield Part(2 * channels, ("moe",), "moe_act")
    of_act = each - 2 + (0 if layer.fused else 1) - (not layer.keeps_input("mlp.experts.experts.linear_fc2"))
    yield Part(of_act * channels, ("moe", "moe_act"))
    # Routers keep tables of the experts, in fp32.
    yield Part(4 * experts.num_experts * layer.fp32 / shares.sequence, ("moe",))
    of_shared = each - (not layer.keeps_input("mlp.shared_experts.linear_fc2"))
    yield Part(of_shared * experts.shared_ffn_hidden_size / shares.tensor, ("moe", "shared_experts"))


def sent_elements(layer: Layer) -> float:
    """Elements per token of a copy for each expert that it goes through, where these are as busy as each other."""
    experts, shares = layer.arch.experts, layer.shares
    assert experts is not None
    return experts.per_token * layer.arch.hidden_size * shares.expert_tensor / shares.tensor


def _running_elements(layer: Layer, *, copies: float, each: float) -> float:
    """Elements per token that a layer of experts holds while these run, one after the other."""
    experts, shares = layer.arch.experts, layer.shares
    assert experts is not None
    one = each * experts.per_token * experts.ffn_hidden_size / experts.num_experts / shares.tensor
    tables = 4 * experts.num_experts * layer.fp32 / shares.sequence
    return copies * sent_elements(layer) + one + tables


def backward_elements(layer: Layer) -> float:
    """Elements per token that its backward needs beside what was kept: the MLP's gradients weigh most."""
    mlp = _running_elements(layer, copies=2, each=2) if layer.sparse else 2 * layer.arch.ffn_hidden_size / layer.shares.tensor
    return mlp + layer.arch.hidden_size / layer.shares.sequence + layer.recomputed()


def scoring_elements(layer: Layer) -> float:
    """Elements per token beside scores that are made outside of kernels, in a forward-only pass: hidden states, queries, keys."""
    shares = layer.shares
    return 4 * layer.arch.hidden_size / shares.sequence + 2 * shares.queries + 3 * shares.keys


def forward_elements(layer: Layer) -> float:
    """Elements per token that it holds at most in a forward-only pass."""
    each = _gated_width(layer)
    # Of experts: tokens sorted, and what comes of each; part of them twice, when it is put together.
    if layer.sparse:
        mlp = _running_elements(layer, copies=3.5, each=each)
    else:
        mlp = each * layer.arch.ffn_hidden_size / layer.shares.tensor
    return 4 * layer.arch.hidden_size / layer.shares.sequence + max(_attention_elements(layer), mlp)


def _attention_elements(layer: Layer) -> float:
    """Elements per token that attention holds while it norms or rotates queries: the most of it, with large heads."""
    arch, shares = layer.arch, layer.shares
    queries, keys = shares.queries, shares.keys
    rotating = (1 if layer.fused else 3) * queries + (arch.qk_norm or arch.qk_norm_whole) * keys
    in_parts = arch.qk_norm_whole or (arch.qk_norm and not layer.fused)
    norming = 3 * queries * layer.fp32 if in_parts else 0.0
    # The projection's output and the queries out of it; angles, cosines and sines.
    return 2 * queries + 2 * keys + max(rotating, norming) + 3 * arch.kv_channels
