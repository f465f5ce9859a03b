"""Mixtures of experts as Hugging Face configs describe them."""

from __future__ import annotations

from typing import Any

from megatron_rmipo.families.architecture import Experts
from megatron_rmipo.families.fields import Fields

_NAMES = ("num_local_experts", "num_experts")


def read_experts(fields: Fields, width: str = "intermediate_size", **more: Any) -> Experts:
    """What configs of all sparse families say alike.

    Args:
        fields: the config.
        width: the field that has the channels between the matrices of an expert.
        more: fields of :class:`Experts` that this family has besides.
    """
    return Experts(
        num_experts=read_num_experts(fields),
        per_token=fields.count("num_experts_per_tok"),
        ffn_hidden_size=fields.count(width),
        aux_loss_coeff=fields.nonnegative("router_aux_loss_coef"),
        **more,
    )


def read_num_experts(fields: Fields) -> int:
    """How many experts a layer has, under either of the names that transformers takes for the other.

    Raises:
        ConversionError: the config says both, and they differ.
    """
    said = {name: fields.count(name) for name in _NAMES if fields.is_given(name)}
    if len(set(said.values())) > 1:
        raise fields.error("num_experts", f"is {said['num_experts']}, but num_local_experts {said['num_local_experts']}")
    return next(iter(said.values()), None) or fields.count("num_experts")


def read_dense_layers(fields: Fields) -> frozenset[int]:
    """Layers with an ordinary MLP: those that are listed, and all but every so manyth.

    Raises:
        ConversionError: the list holds something else than numbers of layers.
    """
    num_layers, step = fields.count("num_hidden_layers"), fields.count("decoder_sparse_step")
    listed = fields.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in listed):
        raise fields.error("mlp_only_layers", f"must list layers from 0 to {num_layers - 1}, found {listed!r}")
    return frozenset(listed) | {layer for layer in range(num_layers) if (layer + 1) % step}
