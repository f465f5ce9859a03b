"""Bytes that attention takes by what attends to what: masks, block tables, and scores that are made outside of kernels.

Shape letters: T tokens, L queries and K keys of a segment, A query heads of a rank, B blocks of 128 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.pack import PackSize, Segment
from megatron_rmipo.memory.shares import FP32_BYTES, Shares
from megatron_rmipo.model.attention.flex import BLOCK_TOKENS, LEAST_HEAD_SIZE
from megatron_rmipo.model.attention.sdpa import MASKS_KEPT, MOST_KEPT, MOST_MASKED, MOST_QUERIES

_INT32_BYTES = 4
# Masks that flex keeps for layers and packs to come.
_FLEX_MASKS = 32


@dataclasses.dataclass(frozen=True)
class AttentionMemory:
    """Bytes of a rank.

    Attributes:
        masks: kept for the layers and packs to come.
        kept: what a layer keeps for the backward pass, by its window: masks as its kernel takes them; or scores, with copies of
            keys and values.
        piece: scores that are made outside of kernels at a time, in fp32; 0 in kernels.
        gathered: keys and values of the whole row on each context-parallel rank, while a layer runs.
    """

    masks: float
    kept: Mapping[int | None, float]
    piece: float
    gathered: float

    @property
    def makes_scores(self) -> bool:
        """Whether scores are made outside of kernels."""
        return self.piece > 0


def attention_backend(arch: ModelArchitecture, config: Config, *, fused: bool) -> str:
    """The backend of a run with kernels as on a GPU, or without: ``flex``, ``te`` or ``sdpa``."""
    name = config.model.attention_backend
    if name != "auto":
        return name
    return "flex" if fused and arch.least_head_size >= LEAST_HEAD_SIZE else "sdpa"


def attention_memory(arch: ModelArchitecture, config: Config, pack: PackSize, *, fused: bool) -> AttentionMemory:
    """What attention takes of a rank by what attends to what in a pack.

    Args:
        arch: the model.
        config: the flags.
        pack: its size.
        fused: kernels as on a GPU.
    """
    windows = {kind.window for kind in arch.layer_kinds} or {None}
    shares = Shares.of(arch, config)
    gathers = shares.context > 1 and config.parallel.cp_comm_type == "all_gather"
    sizes = 2 * shares.keys if arch.latent is None else (arch.query_size + arch.context_size) / shares.tensor
    gathered = pack.num_tokens * sizes * shares.element_bytes if gathers else 0.0
    backend = attention_backend(arch, config, fused=fused)
    if backend != "sdpa":
        blocks = max(2, -(-pack.num_tokens // BLOCK_TOKENS)) if backend == "flex" else 0
        # Four tables of blocks by blocks.
        return AttentionMemory(_FLEX_MASKS * 4 * _INT32_BYTES * blocks**2, dict.fromkeys(windows, 0.0), 0.0, gathered)
    by_hand = arch.attention_softcap is not None or arch.attention_sinks
    # Nor has a CPU a kernel for values narrower than keys.
    makes_scores = by_hand or (arch.latent is not None and not fused)
    pieces = {window: list(_pieces(pack, window, by_hand=by_hand)) for window in windows}
    masked = [one for window, some in pieces.items() for one in some if one.queries != one.keys and _mask_stays(one, window)]
    size = sum(one.queries * one.keys for one in masked) / max(len(masked), 1)
    masks = size * min(MASKS_KEPT, sum(one.number for one in masked))
    measure = _scores_bytes if makes_scores else _mask_bytes
    # Where keys are gathered, all of it is computed anew; where heads are exchanged, masks are those of the whole row.
    share = 0.0 if gathers else 1 / shares.context if makes_scores else 1.0
    kept = {window: share * sum(one.number * measure(arch, shares, one) for one in some) for window, some in pieces.items()}
    scores = [shares.queries / arch.kv_channels * one.queries * one.keys for some in pieces.values() for one in some]
    piece = FP32_BYTES * max(scores, default=0.0) / shares.context if makes_scores else 0.0
    return AttentionMemory(masks, kept, piece, gathered)


def _pieces(pack: PackSize, window: int | None, *, by_hand: bool) -> Iterator[Segment]:
    """What sdpa's code computes at a time: :func:`megatron_rmipo.model.attention.sdpa.attend_segments`."""
    for queries, keys, number in pack.all_segments:
        step = max(1, queries)
        if by_hand or (window is not None and keys > window):
            step = MOST_QUERIES
        elif keys > queries:
            step = max(1, MOST_MASKED // keys)
        for first in range(0, queries, step):
            end = min(first + step, queries)
            last = keys - queries + end
            seen = 0 if window is None else max(keys - queries + first + 1 - window, 0)
            yield Segment(end - first, last - seen, number)


def _mask_stays(piece: Segment, window: int | None) -> bool:
    """Whether sdpa's code keeps a mask of a piece for others of its size."""
    return piece.queries * piece.keys <= MOST_KEPT or (window is not None and piece.keys > window)


def _mask_bytes(arch: ModelArchitecture, shares: Shares, piece: Segment) -> float:
    """Torch's kernels take a mask in numbers, and keep it."""
    return piece.queries * piece.keys * shares.element_bytes if piece.queries != piece.keys else 0.0


def _scores_bytes(arch: ModelArchitecture, shares: Shares, piece: Segment) -> float:
    """What is kept of scores made outside of kernels."""
    scores = shares.queries / arch.kv_channels * piece.queries * piece.keys
    if arch.latent is not None:
        # The softmax, and all that goes into it, in fp32.
        copies = (piece.queries + piece.keys) * shares.queries + piece.keys * arch.context_size / shares.tensor
        return FP32_BYTES * (scores + copies)
    # The softmax in fp32; what it is in the dtype of the values; before a cap.
    half = shares.element_bytes != FP32_BYTES
    each = FP32_BYTES * (1 + (arch.attention_softcap is not None)) + half * shares.element_bytes
    # Keys and values stand once for each query head; a mask of its own says what is left out.
    return scores * each + 2 * piece.keys * shares.queries * shares.element_bytes + piece.queries * piece.keys
