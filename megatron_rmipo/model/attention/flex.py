"""FlexAttention over a packed row: the block mask, made on the CPU once a pack, and kernels compiled once a run.

Shape letters: L tokens of this rank, T of the row, which it holds one cp-th of, B blocks of 128 of its tokens, K of those of the
row, R runs, P pieces (the part of one run within one block), A query heads, G key/value heads, D head size, E size of a value.

A kernel is compiled anew when anything changes that it was compiled for, so the lengths of rows must not be among these things:
- every tensor goes in with its tokens as ``[B, 128]``, and B alone is marked as varying. The compiler then knows that a row ends
  with a block, and leaves out the checks for a last one that is not full. Left to itself it would also take a B that happens to
  equal the number of heads for the same number, and compile again for the next row;
- the mask function and the BlockMask are made within the compiled function, out of tensors alone: a function or a number of the
  row handed in from outside would be one more thing to compare;
- a row has two blocks at least: sizes of 1 are always compiled apart;
- a row of a context-parallel rank has cp times as many blocks of keys as of queries, so that there is one unknown length still;
- a sliding window is a matter of each token's bounds and of the tables, not of the kernel: layers with other windows share it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules
from megatron_rmipo.model.attention.sdpa import attend_runs
from megatron_rmipo.runtime.transfers import to_device

# FlexAttention's own default; its kernels work on tiles that divide it.
BLOCK_TOKENS = 128
# Of its CUDA kernels; tensor cores multiply nothing narrower.
LEAST_HEAD_SIZE = 16
# More would mean that something of each row is compiled into its kernel.
MOST_COMPILATIONS = 64
_MIN_BLOCKS = 2
# Of packs whose backward pass, or recomputation, is to come under pipeline parallelism; two of each where layers differ in their
# window. A mask that is not kept is made again.
_MASKS_KEPT = 32
_logger = logging.getLogger(__name__)
_fallbacks = 0
_Flags = npt.NDArray[np.bool_]
_Integers = npt.NDArray[np.int64]
_Range = tuple[_Integers, _Integers]


class RowMask(NamedTuple):
    """What the kernels read of a row's mask, int32, on the device.

    A query q attends to the keys ``own_start[q] .. q`` and ``prefix_start[q] .. prefix_end[q] - 1``; these three are
    ``[B, 128]``. The tables, ``[1, 1, B]`` and ``[1, 1, B, K]``, are those of torch's BlockMask: how many blocks of keys a block
    of queries attends to in part (``kv``) or wholly (``full_kv``), and which; then the same of queries for a block of keys,
    ``[1, 1, K]`` and ``[1, 1, K, B]``. Where queries are not the row's tokens in its order, ``own_start[q] .. own_end[q] - 1``
    are the keys instead, ``[B, 128]``.
    """

    own_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    own_end: Tensor | None = None


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: _Integers,
    scale: float,
    rules: ScoreRules = PLAIN,
    sinks: Tensor | None = None,
) -> Tensor:
    """FlexAttention of a rank's tokens to those of the row that they see.

    Args:
        query: ``[L, A, D]``. L may be any number; unless it is one of whole blocks, two at least, padded copies are made.
        key: ``[T, G, D]``, in the order of the row.
        value: ``[T, G, E]``.
        runs: int64 ``[R, 5]`` that the queries are, see :func:`megatron_rmipo.model.attention.deal.runs_of`.
        scale: of the scores.
        rules: what else happens to them.
        sinks: ``[A]``, where the rules have sinks.

    Returns:
        ``[L, A, E]``.
    """
    num_tokens, cp_size = query.shape[0], key.shape[0] // query.shape[0]
    num_blocks = max(-(-num_tokens // BLOCK_TOKENS), _MIN_BLOCKS)
    # Keyed by the content of the runs: all layers of a pack with the same window, and its recomputation, meet in one entry.
    mask = _row_mask(runs.tobytes(), num_blocks, cp_size, rules.window, query.device)
    blocks = [_in_blocks(query, num_blocks), *(_in_blocks(tensor, cp_size * num_blocks) for tensor in (key, value))]
    try:
        output: Tensor = _call_compiled(_compiled(query.device.type), *blocks, mask, cp_size, scale, rules.softcap, sinks)
    except FailOnRecompileLimitHit:
        _count_fallback()
        return attend_runs(query, key, value, runs, scale, rules, sinks)
    return output[:num_tokens]


def _call_compiled(compiled: Any, *inputs: Any) -> Tensor:
    """A call that may compile anew more often than torch allows a function by default: one for each model of a process, say.

    Raises:
        FailOnRecompileLimitHit: more than ``MOST_COMPILATIONS`` times. Without the compiler FlexAttention would make all T x T
            scores.
    """
    try:
        return compiled(*inputs)  # type: ignore[no-any-return]
    except FailOnRecompileLimitHit:
        # Not around every call: it costs more than the call itself.
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
            return compiled(*inputs)  # type: ignore[no-any-return]


def num_fallbacks() -> int:
    """Calls of this process that :func:`attend_runs` took over, because no more kernels were to be compiled."""
    return _fallbacks


def _count_fallback() -> None:
    global _fallbacks
    if not _fallbacks:
        _logger.warning(
            "--attention-backend flex: %d kernels are compiled, and a row wants another one; sdpa computes such rows, segment by "
            "segment, and metrics.jsonl counts them as flex_fallbacks. TORCH_LOGS=recompiles says what differs.",
            MOST_COMPILATIONS,
        )
        # It would say the same at each of these rows, in each layer.
        logging.getLogger("torch._dynamo.convert_frame").setLevel(logging.ERROR)
    _fallbacks += 1


def _in_blocks(tensor: Tensor, num_blocks: int) -> Tensor:
    """``[tokens, heads, D]`` as ``[B, 128, heads, D]``, B marked as varying."""
    padding = num_blocks * BLOCK_TOKENS - tensor.shape[0]
    if padding:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, padding))
    blocks = tensor.view(num_blocks, BLOCK_TOKENS, *tensor.shape[1:])
    torch._dynamo.mark_dynamic(blocks, 0)
    return blocks


@functools.cache
def _compiled(device_type: str) -> Any:
    # The eager backend traces alike, but runs FlexAttention's reference implementation, which has no backward pass on the CPU.
    backend = "inductor" if device_type == "cuda" else "eager"
    # Not dynamic=True: head counts and sizes have to stay constants of the kernel.
    return torch.compile(_attend_blocks, backend=backend, fullgraph=True, dynamic=False)


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowMask,
    cp_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[L, A, E]`` from queries ``[B, 128, A, D]``, keys ``[K, 128, G, D]``, values of E. This is what is compiled."""
    bounds = mask[:3] if mask.own_end is None else (*mask[:3], mask.own_end)
    tables = mask[3:11]
    of_queries = [bound.shape[0] for bound in bounds] + [size for table in tables[:4] for size in table.shape[2:3]]
    of_queries += [size for table in tables[4:] for size in table.shape[3:]]
    of_keys = [key.shape[0], value.shape[0]] + [size for table in tables[:4] for size in table.shape[3:]]
    of_keys += [size for table in tables[4:] for size in table.shape[2:3]]
    # The compiler is to reckon with one unknown length, not with one for each tensor.
    for length in of_queries:
        torch._check(length == query.shape[0])  # type: ignore[no-untyped-call]
    for length in of_keys:
        torch._check(length == cp_size * query.shape[0])  # type: ignore[no-untyped-call]
    # [B, 128, heads, D] -> [1, heads, tokens, D]
    query, key, value = (tensor.flatten(0, 1).transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    own_start, prefix_start, prefix_end = (bound.flatten() for bound in bounds[:3])
    own_end = None if mask.own_end is None else mask.own_end.flatten()

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = ((k <= q) if own_end is None else (k < own_end[q])) & (k >= own_start[q])
        prefix = (k >= prefix_start[q]) & (k < prefix_end[q])
        return own | prefix

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    block_mask = BlockMask(
        seq_lengths=(query.shape[2], key.shape[2]),
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
        mask_mod=attends,
    )
    grouped = query.shape[1] != key.shape[1]
    output, aux = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=grouped,
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        # What a sink leaves of the softmax: exp(lse) / (exp(lse) + exp(sink)).
        assert aux.lse is not None
        output = output * torch.sigmoid(aux.lse - sinks[:, None]).to(output.dtype)[..., None]
    return output.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=_MASKS_KEPT)
def _row_mask(runs_bytes: bytes, num_blocks: int, cp_size: int, window: int | None, device: torch.device) -> RowMask:
    """The mask of a rank's tokens on the device, every dimension of blocks marked as varying."""
    runs = np.frombuffer(runs_bytes, dtype=np.int64).reshape(-1, 5)
    tensors = row_mask_arrays(runs, num_blocks, window, cp_size=cp_size)
    mask = RowMask(*(to_device(torch.from_numpy(array), device) for array in tensors))
    for bound in (*mask[:3], *mask[11:]):
        if bound is not None:
            torch._dynamo.mark_dynamic(bound, 0)
    for table in mask[3:11]:
        torch._dynamo.mark_dynamic(table, tuple(range(2, table.dim())))
    return mask


def row_mask_arrays(
    runs: _Integers, num_blocks: int, window: int | None = None, *, cp_size: int = 1
) -> tuple[npt.NDArray[np.int32], ...]:
    """The fields of :class:`RowMask` as NumPy arrays, from ``runs [R, 5]``. Exact, without the ``[L, T]`` mask.

    Args:
        runs: in the order of the rank's tokens, which they cover without a gap.
        num_blocks: B; tokens behind the runs, up to the end of the last block, become a segment of their own, behind the row.
        window: how many tokens one sees, by position; None for all before it.
        cp_size: as many times longer is the row; ``own_end`` is there where that is not 1.
    """
    num_tokens = int(runs[:, 1].sum())
    padding = num_blocks * BLOCK_TOKENS - num_tokens
    if padding:
        end = cp_size * num_tokens
        runs = np.vstack([runs, [[end, padding, end, 0, 0]]])
    begins = np.cumsum(runs[:, 1]) - runs[:, 1]
    owner = np.repeat(runs, runs[:, 1], axis=0)
    token = np.arange(num_blocks * BLOCK_TOKENS) + np.repeat(runs[:, 0] - begins, runs[:, 1])
    prefix, own = _seen(owner, token, token, window)
    bounds = (own[0], *prefix)
    partial, full = _classify_blocks(runs, begins, num_blocks, cp_size * num_blocks, window)
    tables = [table for flags in (partial, full, partial.T, full.T) for table in _tables(flags)]
    by_block = [bound.reshape(num_blocks, BLOCK_TOKENS) for bound in (*bounds, own[1])]
    arrays = [*by_block[:3], *tables, *(by_block[3:] if cp_size > 1 else [])]
    return tuple(np.ascontiguousarray(array, dtype=np.int32) for array in arrays)


def _classify_blocks(
    runs: _Integers, begins: _Integers, num_blocks: int, num_key_blocks: int, window: int | None
) -> tuple[_Flags, _Flags]:
    """Bool ``[B, K]`` twice: blocks of keys of which a block of queries sees a part, and of which it sees everything."""
    edges = np.arange(num_blocks + 1) * BLOCK_TOKENS
    firsts = np.union1d(begins, edges[:-1])
    lasts = np.append(firsts[1:], edges[-1]) - 1
    number = np.searchsorted(begins, firsts, side="right") - 1
    owner, in_row = runs[number], runs[number, 0] - begins[number]
    firsts_in_row, lasts_in_row = firsts + in_row, lasts + in_row
    of_keys = np.arange(num_key_blocks + 1) * BLOCK_TOKENS
    # Within a piece each query sees one key more than the one before it, and under a window leaves one out: what all see lies
    # between the first that the last one sees and the last that the first one sees; what any sees, the other way around.
    seen_by_all = sum(_overlap(*keys, of_keys) for keys in _seen(owner, lasts_in_row, firsts_in_row, window)) == BLOCK_TOKENS
    seen_by_any = sum(_overlap(*keys, of_keys) for keys in _seen(owner, firsts_in_row, lasts_in_row, window)) > 0
    heads = np.searchsorted(firsts, edges[:-1])
    full = np.logical_and.reduceat(seen_by_all, heads)
    return np.logical_or.reduceat(seen_by_any, heads) & ~full, full


def _seen(owner: _Integers, since: _Integers, until: _Integers, window: int | None) -> tuple[_Range, _Range]:
    """Keys from the first that token ``since`` sees to the last that ``until`` sees: (start, end) in the prefix, in the segment.

    Args:
        owner: ``[..., 5]``, the run of both tokens.
        since, until: int64 ``[...]``, tokens of the row.
        window: how many tokens one sees.
    """
    _, _, start, prefix_start, prefix_length = owner.T
    # Counted from where the prefix starts.
    position = prefix_length + since - start
    first = np.zeros_like(since) if window is None else np.maximum(position + 1 - window, 0)
    in_prefix = (prefix_start + np.minimum(first, prefix_length), prefix_start + prefix_length)
    return in_prefix, (start + np.maximum(first - prefix_length, 0), until + 1)


def _overlap(start: _Integers, end: _Integers, edges: _Integers) -> _Integers:
    """Tokens of ranges ``start [P] .. end [P]`` in each block, int64 ``[P, K]``."""
    shared: _Integers = np.minimum(end[:, None], edges[None, 1:]) - np.maximum(start[:, None], edges[None, :-1])
    return shared.clip(min=0)


def _tables(flags: _Flags) -> tuple[_Integers, _Integers]:
    """How many columns of each row are set, ``[1, 1, B]``, and the columns, ``[1, 1, B, K]``, those that are set first."""
    return flags.sum(1)[None, None], np.argsort(~flags, axis=1, kind="stable")[None, None]
