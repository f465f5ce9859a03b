"""Where Megatron-Core's ``sharded_state_dict`` puts the tensors of a GPTModel, and what it keeps beside them.

A tensor of every layer is one entry of shape ``[layers, ...]``, or, where layers differ in kind, an entry each with the number of
the layer in its key. A tensor of every expert has a dimension of experts behind that of the layers, and no number in its key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place

LAYERS = "decoder.layers."
# Modules whose extra state (fp8 scales) Megatron-Core's layers, local or Transformer Engine's, look for in a checkpoint, and the
# trait of the layers that have them.
_STATEFUL = {
    "self_attention.linear_qkv": "without_latents",
    "self_attention.linear_q_proj": "query_without_latent",
    "self_attention.linear_q_down_proj": "query_latent",
    "self_attention.linear_q_up_proj": "query_latent",
    "self_attention.linear_kv_down_proj": "latent",
    "self_attention.linear_kv_up_proj": "latent",
    "self_attention.core_attention": None,
    "self_attention.linear_proj": None,
    "self_attention.q_layernorm": "qk_norm",
    "self_attention.k_layernorm": "qk_norm",
    "mlp.linear_fc1": "dense_layers",
    "mlp.linear_fc2": "dense_layers",
    "pre_mlp_layernorm": "expert_layers",
    "mlp.shared_experts.linear_fc1": "shared_expert_layers",
    "mlp.shared_experts.linear_fc2": "shared_expert_layers",
}
_STATEFUL_OF_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


class Location(NamedTuple):
    """Where a tensor is stored.

    Attributes:
        key: the entry.
        at: its place along the entry's first dimensions.
        sizes: of those dimensions.
    """

    key: str
    at: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def extra_state_keys(arch: ModelArchitecture) -> list[str]:
    """Keys of the modules' extra state, of every layer and expert."""
    return [*_extra_state_keys(arch), "decoder.final_layernorm._extra_state/shard_0_1"]


def _extra_state_keys(arch: ModelArchitecture) -> Iterator[str]:
    for layer in range(arch.num_layers):
        for module, trait in _STATEFUL.items():
            if arch.has(trait, layer):
                yield _object_key(module, Place(layer), arch)
        if arch.experts is not None and layer in arch.expert_layers:
            for module in _STATEFUL_OF_EXPERTS:
                yield from (_object_key(module, Place(layer, expert), arch) for expert in range(arch.experts.num_experts))


def _object_key(module: str, place: Place, arch: ModelArchitecture) -> str:
    key, index, sizes = location_of(f"{LAYERS}{module}._extra_state", place, arch, apart=arch.has_mixed_layers)
    shard, shape = (".".join(map(str, numbers)) for numbers in (index or (0,), sizes or (1,)))
    return f"{key}/shard_{shard}_{shape}"


def location_of(name: str, place: Place, arch: ModelArchitecture, *, apart: bool) -> Location:
    """Where what is called ``name`` without numbers is stored for ``place``.

    Args:
        name: of a tensor, or of a module's state.
        place: which of those it is.
        arch: the model.
        apart: layers have entries of their own.
    """
    index: list[int] = []
    sizes: list[int] = []
    if place.layer is not None and apart:
        name = name.replace(LAYERS, f"{LAYERS}{place.layer}.", 1)
    elif place.layer is not None:
        index.append(place.layer)
        sizes.append(arch.num_layers)
    if place.expert is not None:
        assert arch.experts is not None
        index.append(place.expert)
        sizes.append(arch.experts.num_experts)
    return Location(name, tuple(index), tuple(sizes))
