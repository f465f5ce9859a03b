"""Adapters on a Megatron model that has its weights: they are frozen, and beside each targeted one a low-rank adapter stands.

Classes, names and weights of the model's modules stay. An adapter is a child module of its linear layer, called ``adapter``.

Shape letters: R rows of a projection, C its columns, r the adapter's rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.tensors import rules_of
from megatron_rmipo.model.lora.adapted import AdaptedExperts, AdaptedLinear, is_grouped
from megatron_rmipo.model.lora.low_rank import Cut, Linear, LowRank, Part
from megatron_rmipo.model.lora.plan import AdapterPlan
from megatron_rmipo.model.lora.projections import Projection, adapter_key, projections_of
from megatron_rmipo.model.lora.switch import Switch, switch_of
from megatron_rmipo.model.named_tensors import ADAPTER, NamedTensor, named_tensors
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.runtime.groups import ProcessGroups


def add_adapters(
    model: Chunks, arch: ModelArchitecture, plans: Mapping[str, AdapterPlan], groups: ProcessGroups, *, seed: int
) -> None:
    """Freeze a model and give it adapters that change nothing yet. All ranks call it together, before DDP is built.

    A is drawn as PEFT draws it, from the seed and the projection's name: the same at any layout. B is zero, lengths are those of
    the rows.

    Args:
        model: this rank's part with its weights, or its chunks.
        arch: what it is.
        plans: name -> what is changed; ``adapter`` is trained and active, others stay as they are.
        groups: the process groups of this rank.
        seed: of A.
    """
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    for chunk in chunks_of(model):
        inner: Any = unwrapped(chunk)
        inner.requires_grad_(False)
        if inner.pre_process:
            inner.embedding.register_forward_hook(_begin_graph)
        tensors = [one for one in named_tensors(inner, arch, groups) if one.known_as is not None]
        maker = _Maker(arch, groups, seed, sequence_parallel=inner.config.sequence_parallel)
        for module, weights in _matrices(tensors):
            made = {name: maker.adapters(weights, rules, plan, name) for name, plan in plans.items()}
            _add(module, {name: adapters for name, adapters in made.items() if adapters}, switch_of(inner))
        for one in tensors:
            _train_whole(one, plans, switch_of(inner))


def low_ranks(model: Chunks, name: str = ADAPTER) -> Iterator[tuple[str, Module, LowRank]]:
    """The adapters of this rank, chunk by chunk: full name in the chunk, the layer, the adapter; of grouped experts one each."""
    for chunk in chunks_of(model):
        for layer_name, layer in unwrapped(chunk).named_modules():
            adapter = layer._modules.get(name)
            if isinstance(adapter, LowRank):
                yield f"{layer_name}.{name}", layer, adapter
            elif isinstance(adapter, ModuleList):
                for number, one in enumerate(adapter):
                    assert isinstance(one, LowRank)
                    yield f"{layer_name}.{name}.{number}", layer, one


def _begin_graph(_module: Module, _inputs: Any, output: Tensor) -> None:
    """Frozen embeddings need no gradient, but what is computed anew in the backward pass has one only if its inputs have."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def _matrices(tensors: list[NamedTensor]) -> Iterator[tuple[Module, list[NamedTensor]]]:
    """Modules with matrices, and those: one, or one an expert."""
    by_module: dict[Module, list[NamedTensor]] = {}
    for one in tensors:
        if one.tensor.dim() == 2:
            by_module.setdefault(one.module, []).append(one)
    yield from by_module.items()


def _add(module: Module, made: Mapping[str, list[LowRank]], switch: Switch) -> None:
    if not made:
        return
    if is_grouped(module):
        for name, adapters in made.items():
            module.add_module(name, ModuleList(adapters))
        AdaptedExperts(module, made, switch)
        return
    single = {name: adapter for name, (adapter,) in made.items()}
    for name, adapter in single.items():
        if not adapter.is_registered:
            adapter.is_registered = True
            module.add_module(name, adapter)
    AdaptedLinear(module, single, switch)


def _train_whole(one: NamedTensor, plans: Mapping[str, AdapterPlan], switch: Switch) -> None:
    assert one.known_as is not None
    changing = [name for name, plan in plans.items() if one.known_as in plan.trained_whole]
    if not changing:
        return
    assert isinstance(one.tensor, Parameter)
    for name in [None, *changing]:
        if name != ADAPTER:
            switch.keep(one.tensor, name, one.tensor.detach().clone())
    one.tensor.requires_grad_(ADAPTER in changing)


class _Maker:
    """Makes the adapters of a chunk.

    Args:
        arch, groups, seed: as of :func:`add_adapters`.
        sequence_parallel: of the chunk's layers.
    """

    def __init__(self, arch: ModelArchitecture, groups: ProcessGroups, seed: int, *, sequence_parallel: bool) -> None:
        self.arch, self.groups, self.seed = arch, groups, seed
        self.sequence_parallel = sequence_parallel and groups.tp_size > 1
        self._shared: dict[tuple[str, str, int | None], LowRank] = {}

    def adapters(self, weights: list[NamedTensor], rules: Mapping[str, Rule], plan: AdapterPlan, name: str) -> list[LowRank]:
        """Of a module's matrices, in their order; none where it has none."""
        return [adapter for one in weights if (adapter := self._adapter(one, rules, plan, name)) is not None]

    def _adapter(self, one: NamedTensor, rules: Mapping[str, Rule], plan: AdapterPlan, name: str) -> LowRank | None:
        assert one.known_as is not None
        (megatron, place), rule = one.known_as, rules[one.known_as[0]]
        is_shared = rule.per_expert and plan.shares_experts
        group = self.groups.expert_tp if rule.per_expert else self.groups.tp
        key = (name, megatron, place.layer)
        if is_shared and key in self._shared:
            return self._shared[key]
        projections = projections_of(rule, place, self.arch, plan.projections, group.rank(), group.size())
        if not projections:
            return None
        if is_shared:
            # Other ranks' experts have it, too: it is held and reduced as what is no expert's.
            projections = tuple(dataclasses.replace(projection, expert=None) for projection in projections)
            # Ranks that share no expert see tokens of their own.
            is_cut = group.size() > 1
            linear = Linear(
                _cut(rule) if is_cut else "nothing",
                group,
                self.sequence_parallel and not is_cut,
                in_expert=True,
                is_shared=True,
            )
        else:
            linear = Linear(_cut(rule), group, self.sequence_parallel and not rule.per_expert, in_expert=rule.per_expert)
        parts = [self._part(projection, one.tensor, use_dora=plan.use_dora) for projection in projections]
        adapter = LowRank(linear, one.tensor.shape[0], parts, trains=name == ADAPTER)
        adapter.key = adapter_key(megatron, place)
        if plan.use_dora:
            adapter.set_lengths(adapter.row_lengths(one.tensor.detach()))
        if is_shared:
            self._shared[key] = adapter
        return adapter

    def _part(self, projection: Projection, weight: Tensor, *, use_dora: bool) -> Part:
        rank, (_, num_columns) = projection.low_rank.rank, projection.shape
        # In float64 models as they are; fp32 beside any of fewer digits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        text = f"{self.seed} {projection.name} {projection.expert}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
        bound = num_columns**-0.5
        columns = torch.empty(rank, num_columns).uniform_(-bound, bound, generator=generator)[:, projection.columns]
        num_rows = sum(stop - start for start, stop in projection.rows)
        zeros = torch.zeros(num_rows, rank, dtype=dtype, device=weight.device)
        lengths = torch.ones(num_rows, dtype=dtype, device=weight.device) if use_dora else None
        return Part(projection, columns.to(dtype=dtype, device=weight.device).contiguous(), zeros, lengths)


def _cut(rule: Rule) -> Cut:
    if not rule.is_cut:
        return "nothing"
    return "columns of the input" if rule.cuts_columns else "columns of the output"
