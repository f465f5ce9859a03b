"""Steps of the trainer on whole batches, timed phase by phase, the device waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from benchmarks.inputs import Pairs
from benchmarks.measure import timed
from benchmarks.sides import batch_builder, minimum_flops
from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.packing import pack_pairs, pack_responses
from megatron_rmipo.memory.peak import forget_peak_memory, peak_memory_bytes
from megatron_rmipo.model.logprobs import linear_logprobs
from megatron_rmipo.model.packed_model import head_weight
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.reports.timers import Phase, PhaseTimer
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState
from megatron_rmipo.training.step import train_step


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to lay out and train the same pairs.

    Attributes:
        objective: ``rmipo`` or ``simpo``.
        share_prompts: a prompt stands once for both responses.
        packed: several pairs to a micro-batch; else one, still without padding.
    """

    objective: str = "rmipo"
    share_prompts: bool = True
    packed: bool = True


VARIANTS = {
    "rmipo": Variant(),
    "simpo": Variant(objective="simpo"),
    "prompts twice": Variant(share_prompts=False),
    "a pair a micro-batch": Variant(packed=False),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """What some steps took.

    Attributes:
        seconds: of each step.
        phases: mean seconds of ``before`` (the unconditional pass), ``gradient`` (forward, backward), ``optimizer``, ``other``.
        flops: those that the loss of each step needs, however it is laid out, see :mod:`megatron_rmipo.model.flops`.
        peak_bytes: most memory in use, weights and optimizer included.
    """

    seconds: list[float]
    phases: dict[str, float]
    flops: list[float]
    peak_bytes: int


class WaitingTimer(PhaseTimer):
    """A phase ends when the device has done its work."""

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What happens within belongs to this phase, on the device, too."""
        torch.cuda.synchronize()
        with super().phase(name):
            yield
            torch.cuda.synchronize()


def build_batches(pairs: Pairs, state: TrainingState, variant: Variant, batch_size: int, tokens: int) -> list[RankBatch]:
    """The pairs in their order, ``batch_size`` to a step, at most ``tokens`` to a packed micro-batch.

    What a batch costs is what its loss needs: prompts once, whichever way they are laid out.
    """
    arch = state.policy.architecture
    objective = build_objective(variant.objective, {})
    builder = batch_builder(pairs, arch, objective, tokens, share_prompts=variant.share_prompts)
    batches = []
    for first in range(0, len(pairs) - batch_size + 1, batch_size):
        batch = builder.build(np.arange(first, first + batch_size))
        needed = minimum_flops(arch, Pairs(pairs[first : first + batch_size]), variant.objective)
        batches.append(dataclasses.replace(batch if variant.packed else unpacked(batch, pairs, builder.layout), cost=needed))
    return batches


def unpacked(batch: RankBatch, pairs: Pairs, layout: BatchLayout) -> RankBatch:
    """The same batch, one pair to a micro-batch."""
    members = [([pairs[int(index)]], [number]) for number, index in enumerate(batch.pair_indices)]
    context, multiple_of = layout.context_token_id, layout.multiple_of
    conditional = [pack_pairs(*member, share_prompts=layout.share_prompts, multiple_of=multiple_of) for member in members]
    unconditional = [pack_responses(*member, context_token_id=context, multiple_of=multiple_of) for member in members]
    return dataclasses.replace(batch, conditional=conditional, unconditional=unconditional if batch.unconditional else [])


def time_steps(
    state: TrainingState, batches: Sequence[RankBatch], objective_name: str, groups: ProcessGroups, *, warmups: int
) -> Timing:
    """Train on the batches one after the other; the first ``warmups`` of them are not timed."""
    objective = build_objective(objective_name, {})
    # Before the warm-ups: it empties the allocator's cache, which they fill again.
    forget_peak_memory()
    for batch in batches[:warmups]:
        train_step(state, batch, objective, groups)
    seconds: list[float] = []
    phases: dict[str, float] = {}
    for batch in batches[warmups:]:
        timer = WaitingTimer()
        torch.cuda.synchronize()
        started = time.perf_counter()
        train_step(state, batch, objective, groups, timer)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        taken = timer.take()
        for name, share in (taken | {"other": seconds[-1] - sum(taken.values())}).items():
            phases[name] = phases.get(name, 0.0) + share
    means = {name: total / len(seconds) for name, total in phases.items()}
    return Timing(seconds, means, [batch.cost for batch in batches[warmups:]], peak_memory_bytes())


@contextlib.contextmanager
def without_layers(policy: PolicyModel) -> Iterator[None]:
    """The policy with its embedding, final norm and output layer alone; weights stay where they are."""
    decoder = policy.decoder
    layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
    try:
        yield
    finally:
        decoder.layers = layers


def ends_seconds(
    state: TrainingState, batches: Sequence[RankBatch], objective_name: str, groups: ProcessGroups, whole: Timing, *, warmups: int
) -> float:
    """Seconds of a step that do not depend on the number of layers, measured apart.

    The passes of the same steps through the same model without its layers, and of the optimizer's phase of whole steps the share
    of the parameters outside the layers.
    """
    with without_layers(state.policy[0]):
        timing = time_steps(state, batches, objective_name, groups, warmups=warmups)
        outside = sum(parameter.numel() for parameter in state.policy.parameters())
    share = float(outside / sum(parameter.numel() for parameter in state.policy.parameters()))
    return timing.phases["before"] + timing.phases["gradient"] + share * whole.phases["optimizer"]


def head_tflops(policy: PolicyModel, tokens: int, repeats: int) -> float:
    """TFLOP/s of output layer and log-probs, forward and backward, the median of ``repeats`` calls.

    Counted are four products of 2 x tokens x hidden size x vocabulary: logits, logits again in backward, both gradients. That is
    how fused heads are usually rated.
    """
    weight = head_weight(policy)
    vocab_size, hidden_size = policy.architecture.vocab_size, policy.architecture.hidden_size
    generator = torch.Generator(device=weight.device).manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device=weight.device).to(weight.dtype).requires_grad_()
    target = torch.randint(vocab_size, (tokens,), generator=generator, device=weight.device)

    def call() -> None:
        logprobs = linear_logprobs(hidden, weight, target, vocab_size=vocab_size)
        torch.autograd.grad(logprobs.sum(), (hidden, weight))

    call()
    seconds = float(np.median([timed(call)[0] for _ in range(repeats)]))
    return 8.0 * tokens * hidden_size * vocab_size / seconds / 1e12


def time_padded(step: Callable[[slice], object], num_batches: int, batch_size: int, *, warmups: int) -> list[float]:
    """Seconds of each padded step over the batches that ``time_steps`` times, after one over the first batch of all.

    Args:
        step: does an optimizer step over a slice of the pairs.
        num_batches: how many of the timed batches.
        batch_size: pairs of a batch.
        warmups: batches that are not timed.
    """
    step(slice(0, batch_size))
    firsts = [batch_size * (warmups + number) for number in range(num_batches)]
    return [timed(lambda first=first: step(slice(first, first + batch_size)))[0] for first in firsts]  # type: ignore[misc]
