"""The values of adapters that models have: taken from PEFT's files into each rank's part, and put together out of them.

Shape letters: R rows of a projection, C its columns, r the adapter's rank, E experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.checkpoint.peft.factors import LowRankFactors, stack_experts
from megatron_rmipo.checkpoint.peft.forms import PEFT_NAMES
from megatron_rmipo.checkpoint.peft.reading import Adapter
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.segments import rank_columns, rank_rows
from megatron_rmipo.families.tensors import megatron_shape, rules_of, source_shapes, tensors_of
from megatron_rmipo.model.lora.held import HeldFactor, held_factors
from megatron_rmipo.model.lora.plan import AdapterPlan
from megatron_rmipo.model.lora.projections import FactorKind, projection_names
from megatron_rmipo.model.lora.switch import switch_of
from megatron_rmipo.model.named_tensors import ADAPTER, named_tensors
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


@dataclasses.dataclass(frozen=True)
class AdapterValues:
    """The tensors of an adapter, whole.

    Attributes:
        factors: module, or parameter of all experts of a layer -> its tensors by ``lora_A`` and so on, as PEFT has them.
        whole: tensor that was trained whole, by its Hugging Face name.
    """

    factors: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]


@torch.no_grad()
def load_values(
    model: Chunks, adapter: Adapter, plan: AdapterPlan, arch: ModelArchitecture, groups: ProcessGroups, name: str = ADAPTER
) -> None:
    """Give an adapter of a model the values of PEFT's files, each rank its part. No communication.

    Args:
        model: this rank's part of an adapted model, or its chunks; not yet wrapped for training.
        adapter: read.
        plan: of the adapter in the model; it was made of these files.
        arch: the model.
        groups: the process groups of this rank.
        name: of the adapter in the model.
    """
    for held in held_factors(model, name):
        whole = _factor(adapter.factors[held.projection.name], held)
        for (offsets, sizes), stretch in held.stretches:
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            stretch.copy_(whole[box])
    saved = adapter.read_whole() if plan.trained_whole else {}
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    for chunk in chunks_of(model):
        switch = switch_of(chunk)
        for one in named_tensors(unwrapped(chunk), arch, groups):
            if one.known_as in plan.trained_whole:
                rule, place = rules[one.known_as[0]], one.known_as[1]
                value = one.tensor.detach().clone()
                (source,) = rule.source_names(place)
                _fill_part(value, saved[source], rule, groups)
                if name == ADAPTER:
                    one.tensor.copy_(value)
                else:
                    assert isinstance(one.tensor, torch.nn.Parameter)
                    switch.keep(one.tensor, name, value)


@torch.no_grad()
def gather_values(model: Chunks, plan: AdapterPlan, arch: ModelArchitecture, groups: ProcessGroups) -> AdapterValues | None:
    """The trained adapter, put together on the first rank; None elsewhere. All ranks call it together.

    Bits are summed over the ranks, of which one has them and the others zeros, so that nothing is rounded.

    Args:
        model: this rank's part of an adapted model, or its chunks.
        plan: of the adapter.
        arch: the model.
        groups: the process groups of this rank.
    """
    held: dict[tuple[str, FactorKind], list[HeldFactor]] = {}
    for one in held_factors(model):
        held.setdefault((one.projection.name, one.kind), []).append(one)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, shape, num_experts in _projections(plan, arch):
        rank = plan.projections[name].rank
        shapes: dict[FactorKind, tuple[int, ...]] = {"A": (rank, shape[1]), "B": (shape[0], rank)}
        if plan.use_dora:
            shapes["magnitude"] = (shape[0],)
        own = {
            kind: _summed((num_experts or 1, *whole), held.get((name, kind), []), groups, all_alike=plan.shares_experts)
            for kind, whole in shapes.items()
        }
        if groups.rank == 0:
            factors[name] = {PEFT_NAMES[kind]: tensor[0] for kind, tensor in own.items()}
            if num_experts is not None:
                pairs = list(zip(own["A"], own["B"], strict=True))
                factors[name]["lora_A"], factors[name]["lora_B"] = stack_experts(pairs)
    whole = _gather_whole(model, plan, arch, groups)
    return AdapterValues(factors, whole) if groups.rank == 0 else None


def _factor(factors: LowRankFactors, held: HeldFactor) -> Tensor:
    if factors.num_experts is not None:
        # One that all experts share is the same for each.
        factors = factors.of_expert(held.projection.expert or 0)
    found = {"A": factors.a, "B": factors.b, "magnitude": factors.magnitude}[held.kind]
    assert found is not None
    return found


def _projections(plan: AdapterPlan, arch: ModelArchitecture) -> Iterator[tuple[str, tuple[int, int], int | None]]:
    """Names of the projections with an adapter, their shapes, and the number of experts of those that are of all of a layer."""
    seen: set[str] = set()
    for rule, place in tensors_of(arch):
        for name, sources in projection_names(rule, place):
            if name in plan.projections and name not in seen and not rule.is_bias:
                seen.add(name)
                shapes = [source_shapes(rule, arch)[source] for source in sources]
                num_experts = arch.experts.num_experts if rule.per_expert and arch.experts is not None else None
                yield name, (sum(shape[0] for shape in shapes), shapes[0][1]), num_experts


def _summed(shape: tuple[int, ...], held: list[HeldFactor], groups: ProcessGroups, *, all_alike: bool) -> Tensor:
    """``[E, ...]`` on the CPU of the first rank: a factor of all experts, or of what is none with a first dimension of one."""
    whole = torch.zeros(shape, dtype=torch.float32, device=current_device())
    for one in held:
        if not _speaks_for(one.is_cut, groups, in_expert=one.in_expert):
            continue
        experts = slice(None) if one.projection.expert is None and all_alike else one.projection.expert or 0
        for (offsets, sizes), stretch in one.stretches:
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            whole[(experts, *box)] = stretch.to(whole.dtype)
    return _sum_bits(whole, groups)


def _speaks_for(is_cut: bool, groups: ProcessGroups, *, in_expert: bool) -> bool:
    """Whether this rank is the one, of those that hold the same, whose values are taken."""
    group, replicas = (groups.expert_tp, groups.expert_dp) if in_expert else (groups.tp, groups.dp_cp)
    return replicas.rank() == 0 and (is_cut or group.rank() == 0)


def _sum_bits(whole: Tensor, groups: ProcessGroups) -> Tensor:
    # As numbers, minus zero would become zero.
    dist.reduce(whole.view(torch.int32), dst=0, group=groups.world)
    return whole.cpu()


def _gather_whole(model: Chunks, plan: AdapterPlan, arch: ModelArchitecture, groups: ProcessGroups) -> dict[str, Tensor]:
    held = {one.known_as: one.tensor.detach() for one in named_tensors(model, arch, groups) if one.known_as in plan.trained_whole}
    rules, found = {rule.megatron: rule for rule in rules_of(arch)}, {}
    for megatron, place in sorted(plan.trained_whole):
        rule, own = rules[megatron], held.get((megatron, place))
        whole = torch.zeros(megatron_shape(rule, arch), dtype=torch.float32, device=current_device())
        if own is not None and _speaks_for(rule.is_cut, groups, in_expert=False):
            _put_part(whole, own.to(whole.dtype), rule, groups)
        summed = _sum_bits(whole, groups)
        if groups.rank == 0:
            (name,) = rule.source_names(place)
            found[name] = summed
    return found


def _fill_part(part: Tensor, whole: Tensor, rule: Rule, groups: ProcessGroups) -> None:
    """Fill this rank's part of a tensor of one source from the whole; what pads a vocabulary stays."""
    for rows, (start, stop), columns in _runs(part, whole, rule, groups):
        part[rows] = whole[start:stop][..., columns].to(part.dtype)


def _put_part(whole: Tensor, part: Tensor, rule: Rule, groups: ProcessGroups) -> None:
    for rows, (start, stop), columns in _runs(part, whole, rule, groups):
        whole[start:stop][..., columns] = part[rows]


def _runs(part: Tensor, whole: Tensor, rule: Rule, groups: ProcessGroups) -> Iterator[tuple[slice, tuple[int, int], slice]]:
    """Runs of rows of this rank's part, where they stand in the whole, and which columns it has."""
    num_rows = part.shape[0] * (groups.tp_size if rule.is_cut and not rule.cuts_columns else 1)
    columns = rank_columns(rule, whole.shape[-1], groups.tp_rank, groups.tp_size) if whole.dim() > 1 else slice(None)
    position = 0
    for start, stop in rank_rows(rule, num_rows, groups.tp_rank, groups.tp_size):
        # Padding stands behind the last row.
        end = min(stop, whole.shape[0])
        if start < end:
            yield slice(position, position + end - start), (start, end), columns
        position += stop - start
