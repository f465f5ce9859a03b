"""What ``--bridge`` refuses before any rank has met another: here no process group exists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.checkpoint.makers import maker_of
from megatron_rmipo.checkpoint.source import find_model
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import CheckpointError, ConfigError, ConversionError
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.objectives.arguments import parse_arguments
from tests.checkpoint.stand_in_bridge import AutoBridge
from tests.integration.problem import make_hf_model

BRIDGE = ("--data-path", "A", "--bridge", "megatron-bridge")


def config_of(*argv: str) -> Config:
    return parse_arguments([*BRIDGE, *argv])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("megatron.bridge")
    module.AutoBridge = AutoBridge
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose family is not known here."""
    directory = make_hf_model(tmp_path / "model")
    change_config(directory, architectures=["OuterForCausalLM"])
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_the_package_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(ConfigError, match=r"Megatron-Bridge is not installed\. .* pip install megatron-bridge"):
        find_model(config_of("--load-hf", str(model)))
    with pytest.raises(ConversionError, match=r"architectures is \['OuterForCausalLM'\].* with --bridge megatron-bridge"):
        find_model(parse_arguments(["--data-path", "A", "--load-hf", str(model)]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--load", "M"), "--bridge needs --load-hf DIR, beside --load too"),
        (("--load-hf", "M", "--reference-load", "R"), "--reference-load: --bridge builds references from Hugging Face models"),
        (("--load-hf", "M", "--save-hf", "O", "--save-hf-dtype", "float32"), "--save-hf-dtype: --bridge exports in the dtype"),
        (("--load-hf", "M", "--transformer-impl", "local"), "--transformer-impl does nothing with --bridge"),
        (("--load-hf", "M", "--model-class", "hybrid"), "--model-class does nothing with --bridge"),
        (("--load-hf", "M", "--fp8-format", "hybrid"), "--fp8-format does nothing with --bridge"),
    ],
)
def test_flags_that_do_not_go_with_it_are_named(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        maker_of(config_of(*argv))
    assert words in str(caught.value)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("provider", "words"),
    [
        (
            {"num_moe_experts": 4},
            "num_moe_experts 4: load and losses of experts are built for families that are known here",
        ),
        ({"multi_latent_attention": True}, "multi_latent_attention turns keys by positions of its own"),
        ({"mtp_num_layers": 1}, "mtp_num_layers 1: multi-token prediction has a loss of its own"),
    ],
)
def test_models_that_cannot_be_scored_are_refused_by_field(model: Path, provider: dict[str, Any], words: str) -> None:
    assert isinstance(find_model(config_of("--load-hf", str(model))).arch, ForeignArchitecture)
    change_config(model, provider=provider)
    with pytest.raises(ConfigError) as caught:
        find_model(config_of("--load-hf", str(model)))
    assert words in str(caught.value)


@pytest.mark.usefixtures("stand_in")
def test_damaged_weights_and_another_models_checkpoint_are_refused(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "iter_0000003" / "hf"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text((model / "config.json").read_text())
    maker = maker_of(config_of("--load-hf", str(model)))
    assert maker.assets_of(tmp_path / "run", 3) == model
    change_config(kept, rope_theta=77.0)
    with pytest.raises(CheckpointError, match=r"hf/config\.json is not the config\.json of --load-hf"):
        maker.assets_of(tmp_path / "run", 3)
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ConversionError, match="safetensors"):
        find_model(config_of("--load-hf", str(model)))
