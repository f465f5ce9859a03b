"""What one rank does with an adapted model: build it at a layout, give it factors, run passes, compare with PEFT's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.lora.attach import add_adapters
from megatron_rmipo.model.lora.held import Box, HeldFactor, held_factors
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.lora.switch import AdapterView
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.step_passes import evaluation_pass, gradient_pass, prepare_batch
from megatron_rmipo.plugin import adapters_off
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState, build_training_state
from tests.integration.adapters.dense import FORMS, Answer, FactorName, Factors
from tests.integration.worlds import Case, build_batches, build_reference, gather_shares, score_all

OBJECTIVES = ("rmipo", "dpo")


def adapted_config(case: Case) -> Config:
    return dataclasses.replace(case.config(), lora=LoraConfig(**FORMS[case.model].flags))


def build_adapted(
    case: Case, folder: Path, groups: ProcessGroups, config: Config | None = None, *, seed: int = 1
) -> TrainingState:
    """The model of the case's form in ``folder / NAME / model``, with an adapter that is new, wrapped for training."""
    hf, config = folder / case.model / "model", config or adapted_config(case)
    arch = read_architecture(hf)
    policy = build_model(arch, config, groups)
    load_hf_weights(policy, hf, arch, groups=groups)
    add_adapters(policy, arch, {ADAPTER: plan_of_flags(arch, config.lora)}, groups, seed=seed)
    return build_training_state(policy, config, groups, train_iters=10)


def fill(state: TrainingState, case: Case, folder: Path, factors: Factors, groups: ProcessGroups) -> None:
    """Give the adapter these factors, and what is trained whole the weights in ``changed``."""
    changed = folder / case.model / "changed"
    if changed.exists():
        load_hf_weights(state.policy, changed, state.policy.architecture, groups=groups)
    for held in held_factors(state.policy):
        for box, own in held.stretches:
            own.copy_(factors[name_of(held)][_slices(box)])
    state.optimizer.reload_model_params()


def name_of(held: HeldFactor) -> FactorName:
    return FactorName(held.projection.name, held.projection.expert, held.kind)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))


def stretches(policy: Policy) -> list[tuple[FactorName, tuple[slice, ...], Tensor]]:
    """What this rank holds: of which factors, where in them, and the values."""
    return [(name_of(held), _slices(box), own.clone()) for held in held_factors(policy) for box, own in held.stretches]


def compare_with_peft(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    """The first loss of dpo with a new adapter; of one that has learned, how far loss, gradients and their norm are off."""
    where = Path(folder)
    state = build_adapted(case, where, groups)
    state.model.eval()
    with adapters_off(state.policy):
        reference = score_all(case, state.policy, pairs, groups)
    found: dict[str, Any] = {"first": losses_of(case, state, pairs, groups, "dpo", reference).double()}
    if case.bf16:
        return found
    factors: Factors = torch.load(where / case.model / "factors.pt", weights_only=False)
    fill(state, case, where, factors, groups)
    for objective in OBJECTIVES:
        answer: Answer = torch.load(where / case.model / f"{objective}.pt", weights_only=False)
        loss = losses_of(case, state, pairs, groups, objective, reference, backward=True).double().mean()
        state.optimizer.prepare_grads()
        norm = float(state.optimizer.get_grad_norm())
        if case.distributed_optimizer:
            for chunk in state.model.chunks:
                gather_shares(chunk)
        errors = _errors(state.policy, answer.factors)
        if answer.modules:
            errors |= _whole_errors(case, where / case.model / f"{objective} gradients", state.policy, groups)
        found[objective] = {"loss": _off(loss, answer.loss), "norm": norm / answer.norm - 1, "errors": errors}
    return found


def losses_of(
    case: Case,
    state: TrainingState,
    pairs: PairCollection,
    groups: ProcessGroups,
    name: str,
    reference: Any,
    *,
    backward: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Each pair's loss by the product's own passes, and with ``backward`` its gradients in the buffers."""
    objective = build_objective(name, options or {})
    case = dataclasses.replace(case, objective=name, options=dict(options or {}))
    pairs.reference_scores = reference if objective.needs.reference else None
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
    pairs.reference_scores = None
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    state.model.eval()
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups, state.reference)
    run: Callable[..., Any] = evaluation_pass
    if backward:
        state.model.train()
        run = gradient_pass
    losses: Tensor = run(state.model, batch, objective, prepared, groups).values["loss"]
    return losses


def _off(found: Any, expected: float) -> float:
    return float(found.detach()) / expected - 1


def _errors(policy: Policy, expected: Factors) -> dict[str, float]:
    """Of each factor of this rank, how far its gradient is off, by the length of all of it."""
    errors = {}
    for held in held_factors(policy):
        whole, first, squares = expected[name_of(held)], 0, 0.0
        for box in held.boxes:
            found = held.parameter.main_grad[first : first + box[1][0]]  # type: ignore[attr-defined]
            first += box[1][0]
            squares += float((found.double() - whole[_slices(box)]).square().sum())
        errors[str(tuple(name_of(held)))] = squares**0.5 / max(float(whole.norm()), 1e-12)
    return errors


def _whole_errors(case: Case, gradients: Path, policy: Policy, groups: ProcessGroups) -> dict[str, float]:
    """Of each weight of this rank that is trained whole, how far its gradient is off; ``gradients`` holds them as weights."""
    expected = build_model(policy.architecture, case.config(), groups)
    load_hf_weights(expected, gradients, policy.architecture, groups=groups)
    names = {held.full_name for held in held_factors(policy)}
    errors = {}
    for theirs, ours in zip(expected, policy, strict=True):
        right = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad and name not in names:
                errors[name] = float((parameter.main_grad - right[name]).norm() / right[name].norm())
    return errors


def epsilon_dpo(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    """Losses and gradients of epsilon_dpo whose reference is the model with its adapter off, and a second frozen model."""
    where, found = Path(folder), []
    for within in (True, False):
        state = build_adapted(case, where, groups)
        fill(state, case, where, torch.load(where / case.model / "factors.pt", weights_only=False), groups)
        hf = where / case.model / "model"
        state.reference = AdapterView(state.model, None) if within else build_reference(case, hf, groups)
        losses = losses_of(case, state, pairs, groups, "epsilon_dpo", None, backward=True, options={"epsilon": 0.2})
        gradients = [parameter.main_grad.clone() for parameter in state.policy.parameters() if parameter.requires_grad]
        found.append((losses, gradients))
    answer: Answer = torch.load(where / case.model / "epsilon_dpo.pt", weights_only=False)
    (losses, gradients), (others, second) = found
    return {
        "loss": _off(losses.double().mean(), answer.loss),
        "errors": _errors(state.policy, answer.factors),
        "same": torch.equal(losses, others) and all(map(torch.equal, gradients, second)),
    }
