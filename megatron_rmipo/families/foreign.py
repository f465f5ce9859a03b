"""What is known of a model of no family here, which another package builds: its sizes, read from Megatron's configuration of it.

They are for what a run plans with: layouts, batches, memory. What such a model computes, its tensors' names among it, they do not
say.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture

FOREIGN = "megatron-bridge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignArchitecture(ModelArchitecture):
    """The sizes of a dense model of no family here. Fields that say what is computed hold their defaults, whatever is true of it.

    Attributes:
        layer_matrices: numbers in the matrices of a layer, estimated: projections of attention and MLP.
        layer_vectors: numbers in its norms and biases, estimated.
    """

    layer_matrices: int
    layer_vectors: int


def foreign_architecture(config: Any, who: str) -> ForeignArchitecture:
    """Read the sizes of a model.

    Args:
        config: Megatron's TransformerConfig of it, with the fields of a GPTModel beside (``vocab_size``, ``seq_length``,
            ``share_embeddings_and_output_weights``), as model providers of Megatron-Bridge have them; what it leaves open counts
            as Megatron fills it.
        who: the model, for messages.

    Raises:
        ConversionError: a size is missing.
    """
    hidden, heads = _size(config, "hidden_size", who), _size(config, "num_attention_heads", who)
    kv_channels = config.kv_channels or hidden // heads
    groups = config.num_query_groups or heads
    ffn = config.ffn_hidden_size or 4 * hidden
    rows = (heads + 2 * groups) * kv_channels
    mlp_rows = (2 if config.gated_linear_unit else 1) * ffn
    biases = rows if config.add_qkv_bias or config.add_bias_linear else 0
    biases += mlp_rows + 2 * hidden if config.add_bias_linear else 0
    return ForeignArchitecture(
        family=FOREIGN,
        num_layers=_size(config, "num_layers", who),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=kv_channels,
        vocab_size=_size(config, "vocab_size", who),
        max_position_embeddings=_size(config, "seq_length", who),
        ropes=(),
        layernorm_epsilon=config.layernorm_epsilon,
        tied_embeddings=config.share_embeddings_and_output_weights,
        dtype=str(config.params_dtype).removeprefix("torch."),
        layer_matrices=hidden * (rows + heads * kv_channels + mlp_rows + ffn),
        layer_vectors=2 * hidden + biases,
    )


def _size(config: Any, name: str, who: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ConversionError(f"{who}: Megatron-Bridge's {type(config).__name__} says {name} {value!r}, which is no size.")
    return value
