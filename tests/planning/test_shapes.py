"""Models by name and by config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.tensors import num_parameters
from megatron_rmipo.planning.shapes import read_shape, shape_names
from tests.integration.data import MODEL

# In units of 1e9, as their publishers count them.
PARAMETERS = {
    "llama3-8b": 8.03,
    "llama3-70b": 70.6,
    "llama3.1-8b": 8.03,
    "llama3.1-70b": 70.6,
    "llama3.1-405b": 405.9,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "gpt-oss-120b": 116.8,
}


def test_the_shapes_have_as_many_parameters_as_the_models() -> None:
    assert {name: num_parameters(read_shape(name)) / 1e9 for name in shape_names()} == pytest.approx(PARAMETERS, rel=2e-3)


def test_a_directory_and_its_file_are_the_same_model() -> None:
    assert read_shape(str(MODEL)) == read_shape(str(MODEL / "config.json"))


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"--hf-model llama9.*llama3-8b"):
        read_shape("llama9")
    config = {**json.loads((MODEL / "config.json").read_text()), "residual_scale": 0.5}
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"changed\.json.*residual_scale"):
        read_shape(str(path))
