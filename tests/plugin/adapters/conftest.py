from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.integration.problem import DenseProblem, make_hf_model, make_pairs


@dataclasses.dataclass(frozen=True)
class Problem:
    """24 pairs under two small models, the answers in float64, and the models in fp32."""

    dense: DenseProblem
    hf_dir: Path
    reference_dir: Path

    def models(self) -> tuple[Any, Any]:
        """Policy and reference, anew."""
        policy, reference = (load_model(path) for path in (self.hf_dir, self.reference_dir))
        return policy, reference


def load_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("models")
    hf_dir, reference_dir = make_hf_model(folder / "model", layers=2), make_hf_model(folder / "reference", layers=2, seed=1)
    return Problem(DenseProblem(hf_dir, reference_dir, make_pairs()), hf_dir, reference_dir)


def check_gradients(model: Any, gradients: dict[str, Tensor]) -> None:
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    wrong = torch.stack([(parameter.grad - gradients[name]).norm() for name, parameter in model.named_parameters()]).norm()
    assert wrong <= 1e-4 * norm
