"""The model that a GPU's memory holds, and what its speed says of the whole one.

Llama-3-8B with fewer layers and everything else as it is: a layer then costs what it costs in the whole model, and only the two
ends (embedding and output layer) weigh more than they would there. :func:`seconds_at` takes that out.
"""

from __future__ import annotations

from megatron_rmipo.model.architecture import ModelArchitecture

FULL_LAYERS = 32
# bf16 weight, fp32 gradient, fp32 master weight, two fp32 moments.
BYTES_PER_PARAMETER = 18
# What is left to what is not counted: attention masks, the optimizer's temporaries, fragmentation.
USABLE_MEMORY = 0.9


def layer_parameters(arch: ModelArchitecture) -> int:
    """Weights of one layer: attention, MLP, two norms."""
    query, key = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    attention = arch.hidden_size * (2 * query + 2 * key)
    return attention + 3 * arch.hidden_size * arch.ffn_hidden_size + 2 * arch.hidden_size


def layer_activation_bytes(arch: ModelArchitecture) -> int:
    """bf16 bytes that a layer keeps of a token for its backward pass, nothing recomputed.

    Inputs and outputs of both norms; queries, keys and values before and after rotation and as attention takes them; its output,
    as it leaves it and as the projection takes it; both halves of the MLP's first product, its activation and their product.
    """
    query, key = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    norms = 4 * arch.hidden_size
    attention = (query + 2 * key) + (query + key) + (query + 2 * key) + 2 * query
    return 2 * (norms + attention + 4 * arch.ffn_hidden_size)


def layers_that_fit(arch: ModelArchitecture, memory_bytes: float, tokens: int) -> int:
    """How many layers can be trained, at most those of the whole model; 0 where not even one.

    Args:
        arch: the model; its own number of layers is not read.
        memory_bytes: of the device.
        tokens: of one micro-batch.
    """
    vocabulary = arch.vocab_size * arch.hidden_size
    # Embedding and output layer, and the gradient of the latter in fp32 and bf16 while it is made.
    ends = (2 * BYTES_PER_PARAMETER + 6) * vocabulary
    per_layer = BYTES_PER_PARAMETER * layer_parameters(arch) + layer_activation_bytes(arch) * tokens
    return max(0, min(FULL_LAYERS, int((USABLE_MEMORY * memory_bytes - ends) // per_layer)))


def seconds_at(num_layers: int, *, measured_layers: int, seconds: float, ends_seconds: float) -> float:
    """What a step would take with another number of layers: ``ends + (seconds - ends) * num_layers / measured_layers``.

    Args:
        num_layers: of the model asked about.
        measured_layers, seconds: of the model that was measured, and its step.
        ends_seconds: the part of the step that does not depend on the number of layers: embedding, output layer, loss.
    """
    return ends_seconds + (seconds - ends_seconds) * num_layers / measured_layers
