"""What is computed on this very machine, beside float64: log-probs, packed attention, an optimizer step; files read back.

Shape letters: N scored tokens, H hidden, V vocabulary, T tokens of a row, A heads.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rmipo.doctor.findings import Finding, attempt

# Relative to the largest value, forward and backward.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_REMEDY = "Do not train here before that is mended: try another version of torch, driver or Transformer Engine"
_SEGMENTS = torch.tensor([[0, 61, 0, 0], [61, 19, 0, 40], [80, 53, 0, 0], [133, 8, 80, 31]])


def look_at_kernels() -> Iterator[Finding]:
    """A finding for each kernel that can run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in _TOLERANCES:
        yield _compared(f"log-probs {_short(dtype)}", dtype, partial(_logprobs, dtype, device))
    for backend, dtype in _backends(device):
        yield _compared(f"{backend} {_short(dtype)}", dtype, partial(_attention, backend, dtype, device))
    yield _compared("optimizer step", torch.float32, lambda: _optimizer_step(device))
    yield attempt("files", _files, "Look at the disk")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _backends(device: torch.device) -> Iterator[tuple[str, torch.dtype]]:
    """Of attention, and the dtype that each is tried in."""
    yield from (("sdpa", dtype) for dtype in _TOLERANCES)
    if device.type == "cuda":
        yield "flex", torch.bfloat16
        from megatron_rmipo.model.transformer_engine import transformer_engine_available

        if transformer_engine_available():
            yield "te", torch.bfloat16


def _compared(name: str, dtype: torch.dtype, measure: Callable[[], float]) -> Finding:
    def look() -> Finding:
        error, limit = measure(), _TOLERANCES[dtype]
        text = f"within {error:.1e} of float64, forward and backward"
        if error <= limit:
            return Finding(name, "OK", text)
        return Finding(name, "FAIL", f"{error:.1e} from float64, more than {limit:.0e}", _REMEDY)

    return attempt(name, look, _REMEDY)


def _random(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, each tensor's relative to its largest value; infinite where one is not finite."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        difference = (one.detach().double().cpu() - other.detach().cpu()).abs().max() / other.detach().abs().max().cpu()
        errors.append(float(difference) if math.isfinite(float(difference)) else math.inf)
    return max(errors)


def _with_gradients(output: Tensor, upstream: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output))]


def _wide(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]


def _logprobs(dtype: torch.dtype, device: torch.device) -> float:
    from megatron_rmipo.model.logprobs import linear_logprobs

    num_tokens, hidden_size, vocab_size = 37, 64, 1003
    hidden, weight = inputs = _random(1, (num_tokens, hidden_size), (vocab_size, hidden_size), dtype=dtype, device=device)
    target = torch.arange(num_tokens) * 27
    upstream = torch.linspace(-1.0, 1.0, num_tokens)
    found = _with_gradients(linear_logprobs(hidden, weight, target.to(device), chunk_size=256), upstream.to(device), inputs)
    wide = _wide(inputs)
    logps = torch.log_softmax(wide[0] @ wide[1].T, -1).gather(-1, target[:, None])[:, 0]
    return _error(found, _with_gradients(logps, upstream, wide))


def _attention(backend: str, dtype: torch.dtype, device: torch.device) -> float:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rmipo.model.attention.packed import PackedAttention

    heads, groups, size, num_tokens = 4, 2, 32, int(_SEGMENTS[-1, :2].sum())
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups, attention_dropout=0.0
    )
    attention = PackedAttention(config, 1, backend=backend)
    shapes = [(num_tokens, 1, count, size) for count in (heads, groups, groups)]
    inputs = _random(2, *shapes, dtype=dtype, device=device)
    (upstream,) = _random(3, (num_tokens, 1, heads * size), dtype=dtype, device=device)
    found = _with_gradients(attention(*inputs, _SEGMENTS), upstream, inputs)
    wide = _wide(inputs)
    query, key, value = (tensor[:, 0].transpose(0, 1) for tensor in wide)
    key, value = (tensor.repeat_interleave(heads // groups, dim=0) for tensor in (key, value))
    scores = query @ key.transpose(1, 2) / math.sqrt(size)
    weights = scores.masked_fill(~_sees(num_tokens), -math.inf).softmax(-1)
    dense = (weights @ value).transpose(0, 1).reshape(num_tokens, 1, heads * size)
    return _error(found, _with_gradients(dense, upstream.detach().double().cpu(), wide))


def _sees(num_tokens: int) -> Tensor:
    """Bool ``[T, T]``: own segment causally, and the prefix."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in _SEGMENTS.tolist():
        mask[start : start + length, prefix_start : prefix_start + prefix_length] = True
        mask[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    return mask


def _optimizer_step(device: torch.device) -> float:
    """Three steps of the Adam that Megatron-Core takes, by the formula (Loshchilov and Hutter 2019, algorithm 2)."""
    from megatron.core import optimizer as megatron_optimizer

    lr, betas, eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    start, *gradients = _random(4, *[(33, 7)] * 4, dtype=torch.float32, device=device)
    weight = torch.nn.Parameter(start.detach().clone())
    adam = megatron_optimizer.Adam([weight], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    expected, *wide = (tensor.detach().double().cpu() for tensor in (start, *gradients))
    first = second = torch.zeros_like(expected)
    for step, (gradient, exact) in enumerate(zip(gradients, wide, strict=True), start=1):
        weight.grad = gradient.detach().clone()
        adam.step()
        first = betas[0] * first + (1 - betas[0]) * exact
        second = betas[1] * second + (1 - betas[1]) * exact**2
        change = (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        expected = expected * (1 - lr * decay) - lr * change
    return _error([weight], [expected])


def _files() -> Finding:
    """Prepared pairs and weights, written and read back."""
    from safetensors.torch import load_file, save_file

    from megatron_rmipo.data.store.pair_store import Manifest, PairStore, PairStoreWriter, TokenizedPair, TokenizerInfo

    with tempfile.TemporaryDirectory() as folder:
        ids = [torch.arange(count, dtype=torch.int32).numpy() for count in (5, 3, 7)]
        with PairStoreWriter(Path(folder) / "pairs", vocab_size=400) as writer:
            writer.add(TokenizedPair(*ids))
            writer.finalize(Manifest(TokenizerInfo("", 400, 1, 2)))
        (weight,) = _random(5, (33, 7), dtype=torch.bfloat16, device=torch.device("cpu"))
        save_file({"weight": weight.detach()}, Path(folder) / "x.safetensors")
        pair = PairStore(f"{folder}/pairs")[0]
        read = (pair.prompt, pair.chosen, pair.rejected)
        same = all(bool((one == other).all()) for one, other in zip(read, ids, strict=True))
        same = same and torch.equal(load_file(Path(folder) / "x.safetensors")["weight"], weight)
    if same:
        return Finding("files", "OK", "prepared pairs and safetensors read back as written")
    return Finding("files", "FAIL", "prepared pairs or safetensors are not read back as written", "Look at the disk")
