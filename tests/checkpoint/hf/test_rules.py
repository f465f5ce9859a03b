"""Each rule of each mapping matters: a model whose weights are read by a wrong one computes something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.checkpoint.verify import policy_logits
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place, Rule
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import source_shapes, tensors_of
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import MODEL_TYPES, write_hf_model

TOKENS = torch.randint(203, (40,), generator=torch.Generator().manual_seed(3))


@dataclasses.dataclass(frozen=True)
class Elsewhere(Rule):
    """A rule that takes each tensor from the next layer that has one, or the next expert."""

    places: tuple[Place, ...] = ()

    def source_names(self, place: Place) -> tuple[str, ...]:
        return super().source_names(self.places[(self.places.index(place) + 1) % len(self.places)])


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def mutations(arch: ModelArchitecture) -> Iterator[tuple[Rule, Rule]]:
    """Each rule, and one that is wrong and yet fits all shapes."""
    places: dict[Rule, list[Place]] = {}
    for rule, place in tensors_of(arch):
        places.setdefault(rule, []).append(place)
    for rule, there in places.items():
        shapes = source_shapes(rule, arch)
        if len(there) > 1:
            yield rule, Elsewhere(**vars(rule), places=tuple(there))
        if len(shapes) > 1 and shapes[-1] == shapes[-2]:
            yield rule, dataclasses.replace(rule, sources=(*rule.sources[:-2], *rule.sources[:-3:-1]))
        for other in places:
            if len(there) == 1 and other is not rule and source_shapes(other, arch) == shapes and len(places[other]) == 1:
                yield rule, dataclasses.replace(rule, sources=other.sources)


def difference(policy: PolicyModel, hf: Path, groups: ProcessGroups, expected: Tensor) -> float:
    load_hf_weights(policy, hf, policy.architecture, groups=groups)
    logits = policy_logits(policy, TOKENS, groups)
    assert logits is not None
    return float((logits - expected).abs().max())


def unseen_mutations(
    hf: Path, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch, known: set[tuple[Rule, Rule]]
) -> list[Rule]:
    """Wrong rules, of those not known yet, that a model in ``hf`` computes the same with; all of them are known then."""
    arch = read_architecture(hf)
    family = FAMILIES[arch.family]
    alone = {family.embedding, "decoder.final_layernorm.weight"} if arch.tied_embeddings else {"decoder.final_layernorm.weight"}
    assert {rule.megatron for rule, _ in mutations(arch)} == {rule.megatron for rule, _ in tensors_of(arch)} - alone
    new = set(mutations(arch)) - known
    known |= new
    if not new:
        return []
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(TOKENS[None], use_cache=False).logits[0]
    policy = build_policy(arch, transformer_config(arch, groups), groups).eval()
    assert difference(policy, hf, groups, expected) < 1e-4
    unseen = []
    for rule, wrong in new:
        rules = tuple(wrong if item == rule else item for item in family.rules)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, family.name, dataclasses.replace(family, rules=rules))  # type: ignore[arg-type]
            if difference(policy, hf, groups, expected) < 1e-3:
                unseen.append(wrong)
    return unseen


@pytest.mark.parametrize("model_type", dict.fromkeys(MODEL_TYPES.values()))
def test_a_wrong_rule_shows_in_the_logits(
    tmp_path: Path, model_type: str, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is taken twice leaves something unused, which is another test's matter.
    monkeypatch.setattr("megatron_rmipo.checkpoint.hf.checked_weights.check_keys", lambda *names: None)
    known: set[tuple[Rule, Rule]] = set()
    for kind in (kind for kind, own in MODEL_TYPES.items() if own == model_type):
        hf = write_hf_model(tmp_path / kind, kind)
        assert unseen_mutations(hf, groups, monkeypatch, known) == [], kind
