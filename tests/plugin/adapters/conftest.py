from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.objectives.base import Objective
from tests.integration.problem import DenseProblem, make_hf_model, make_pairs


@dataclasses.dataclass(frozen=True)
class Problem:
    """24 pairs under two small models, the answers in float64, and the models in fp32."""

    dense: DenseProblem
    hf_dir: Path
    reference_dir: Path
    loaded: tuple[Any, Any]
    answers: dict[tuple[type, str, str], Any] = dataclasses.field(default_factory=dict)

    def models(self) -> tuple[Any, Any]:
        """Policy and reference, anew."""
        policy, reference = copy.deepcopy(self.loaded)
        return policy, reference

    def answer(self, objective: Objective) -> Any:
        """As of :meth:`DenseProblem.answer`, computed once for all adapters."""
        key = (type(objective), objective.name, repr(objective.config))
        if key not in self.answers:
            self.answers[key] = self.dense.answer(objective)
        return self.answers[key]


def load_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("models")
    hf_dir, reference_dir = make_hf_model(folder / "model", layers=2), make_hf_model(folder / "reference", layers=2, seed=1)
    loaded = load_model(hf_dir), load_model(reference_dir)
    return Problem(DenseProblem(hf_dir, reference_dir, make_pairs()), hf_dir, reference_dir, loaded)


def check_gradients(model: Any, gradients: dict[str, Tensor]) -> None:
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    wrong = torch.stack([(parameter.grad - gradients[name]).norm() for name, parameter in model.named_parameters()]).norm()
    assert wrong <= 1e-4 * norm
