"""Bytes that the output layer takes while it runs: final norm, scored hidden states, a chunk's logits and their gradients.

Shape letters: T tokens of a pack, N scored tokens, H hidden, C vocabulary entries of a chunk.
"""

from __future__ import annotations

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Family
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.shares import FP32_BYTES, Shares, trains_table


def head_bytes(arch: ModelArchitecture, config: Config, pack: PackSize, *, backward: bool, mixed: bool, fused: bool) -> float:
    """Most bytes at one time on a rank of the last stage.

    Args:
        arch: the model.
        config: the flags.
        pack: its size.
        backward: whether the pass has a backward.
        mixed: logits are mixed with those of a reference in memory.
        fused: norms in fused kernels, as on a GPU.
    """
    shares = Shares.of(arch, config)
    element = shares.element_bytes
    num_tokens, num_scored = pack.num_tokens / shares.context, pack.num_scored / shares.context
    rows = min(config.model.logprob_chunk_size, shares.vocabulary)
    logits = num_scored * rows
    # Of bf16 products that are wanted in fp32 a CPU makes bf16 ones first.
    half = element != FP32_BYTES
    rounded = element if half and not fused else 0
    states = num_tokens * arch.hidden_size * element + num_scored * arch.hidden_size * element
    # One chunk at a time. Mixed: both models' and a mixture.
    forward = states + logits * ((3 if mixed else 1) * FP32_BYTES + rounded)
    if not backward:
        return forward
    states += 3 * num_tokens * arch.hidden_size * element + num_scored * arch.hidden_size * FP32_BYTES
    chunk = logits * (FP32_BYTES + (element if half else 0))
    # In bf16 what is added to fp32 gradients, of the hidden states or of the weight, is a tensor of its own.
    most = max(num_scored, rows) if trains_table(arch, config, Family.head) else num_scored
    product = most * arch.hidden_size * (FP32_BYTES + rounded) if half else 0
    return max(forward, states + chunk + product)
