"""Flags that need Transformer Engine, and what they want of a GPU, a model and the rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model import transformer_engine as flags
from megatron_rmipo.model.problems.layout import layout_problems, refuse_impossible_layout
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.scoring import reference
from megatron_rmipo.training.validation import validate
from tests.training.test_validation import ARCH, BASE

WIDE = dataclasses.replace(ARCH, hidden_size=1536, kv_channels=128, ffn_hidden_size=512)


def config_of(*argv: str) -> Config:
    return parse_arguments([*BASE, *argv])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, with Transformer Engine."""
    monkeypatch.setattr(flags, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config_of(*argv), WIDE, 4)
    return str(caught.value)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "argv",
    [
        ("--fp8-format", "hybrid", "--bf16"),
        ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--bf16", "--tensor-model-parallel-size", "4"),
        ("--attention-backend", "te", "--bf16"),
        ("--attention-backend", "te", "--bf16", "--transformer-impl", "local"),
        ("--transformer-impl", "transformer_engine"),
    ],
)
def test_what_works_on_such_a_gpu_is_let_through(argv: tuple[str, ...]) -> None:
    validate(config_of(*argv), WIDE, 4)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--fp8-recipe", "tensorwise"), ["--fp8-recipe does nothing without --fp8-format"]),
        (("--fp8-format", "hybrid"), ["--fp8-format hybrid needs --bf16"]),
        (("--attention-backend", "te"), ["--attention-backend te needs --bf16"]),
        (
            ("--fp8-format", "e4m3", "--bf16", "--transformer-impl", "local"),
            ["--fp8-format e4m3", "leave --transformer-impl local"],
        ),
        (("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--bf16"), ["--fp8-recipe mxfp8", "10.0 or more", "has 9.0"]),
    ],
)
def test_what_cannot_work_on_such_a_gpu_is_refused(argv: tuple[str, ...], words: list[str]) -> None:
    message = refusal(*argv)
    assert all(word in message for word in words), message
    assert message.count("\n  - ") == 1


@pytest.mark.usefixtures("hopper")
def test_widths_that_fp8_cannot_multiply_are_named() -> None:
    config = config_of("--fp8-format", "hybrid", "--bf16", "--tensor-model-parallel-size", "4")
    with pytest.raises(ConfigError) as caught:
        validate(config, ARCH, 4)
    # Of ARCH: (12 + 2 * 4) heads of 8, 12 heads of 8, 264 channels, each over 4 ranks; its hidden size of 96 is no fault.
    words = "multiples of 16 (--fp8-recipe delayed); at --tensor-model-parallel-size 4 they are: "
    assert words + "queries, keys and values 40, attention output 24, MLP 66" in str(caught.value)
    # Its reference is not computed in fp8.
    refuse_impossible_layout(config, ARCH, 4)


@pytest.mark.parametrize(
    "argv", [("--fp8-format", "hybrid"), ("--attention-backend", "te"), ("--transformer-impl", "transformer_engine")]
)
def test_without_transformer_engine_the_remedy_is_named(argv: tuple[str, ...]) -> None:
    message = refusal(*argv, "--bf16")
    assert f"{' '.join(argv)}: Transformer Engine is not installed, or there is no GPU" in message
    assert "pip install 'megatron_rmipo[te]'" in message


def test_the_reference_is_computed_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Config] = []

    def build(source: ModelSource, config: Config, groups: None) -> torch.nn.Linear:
        built.append(config)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(reference, "load_model", build)
    choice: Any = SimpleNamespace(source=ModelSource(ARCH, Path(), Path(), None))
    reference.load_reference(config_of("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--bf16"), choice, "", None)  # type: ignore[arg-type]
    (config,) = built
    assert (config.model.fp8_format, config.model.fp8_recipe, config.model.bf16) == (None, None, True)


def test_heads_too_small_for_flex_are_named() -> None:
    (problem,) = layout_problems(config_of("--attention-backend", "flex"), ARCH, 1)
    words = ("--attention-backend flex takes heads of 16 or more channels", "the model's have 8", "sdpa would work")
    assert all(word in problem for word in words)
    assert not list(layout_problems(config_of("--attention-backend", "flex"), WIDE, 1))
    assert not list(layout_problems(config_of(), ARCH, 1))


TP4 = ("--tensor-model-parallel-size", "4")


@pytest.mark.parametrize(
    ("argv", "multiple"),
    [
        ((), 1),
        (TP4, 1),
        ((*TP4, "--sequence-parallel"), 4),
        (("--attention-backend", "flex"), 128),
        ((*TP4, "--sequence-parallel", "--attention-backend", "flex"), 128),
        (("--tensor-model-parallel-size", "3", "--sequence-parallel", "--attention-backend", "flex"), 384),
        (("--attention-backend", "te"), 1),
        ((*TP4, "--fp8-format", "hybrid", "--attention-backend", "te"), 16),
        ((*TP4, "--fp8-format", "hybrid", "--attention-backend", "te", "--sequence-parallel"), 64),
        (("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"), 32),
        ((*TP4, "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--sequence-parallel", "--attention-backend", "flex"), 128),
        ((*TP4, "--fp8-format", "hybrid", "--fp8-recipe", "blockwise", "--sequence-parallel"), 512),
        (("--fp8-recipe", "mxfp8"), 1),
    ],
)
def test_rows_are_as_long_as_kernels_and_shards_want(argv: tuple[str, ...], multiple: int) -> None:
    assert conditional_layout(config_of(*argv), ARCH, dp_rank=0, dp_size=1).multiple_of == multiple
