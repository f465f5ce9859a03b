"""Under which fingerprint the log-probs of a reference are kept."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.scoring import reference
from megatron_rmipo.scoring.reference import ReferenceChoice, choose_reference, identify_reference
from tests.integration.data import MODEL

GROUPS: Any = None


def test_log_probs_of_a_quantized_base_are_not_taken_for_those_of_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "weights_fingerprint", lambda *_: "weights")
    source = ModelSource(read_architecture(MODEL), MODEL, MODEL, None)
    kinds = {kind: ReferenceChoice(source, None, within=True, quantized_as=kind) for kind in (None, "nf4", "int8")}
    found = {kind: identify_reference(choice, GROUPS) for kind, choice in kinds.items()}
    assert found[None] == "weights"
    assert len(set(found.values())) == 3
    assert identify_reference(ReferenceChoice(source, found["nf4"], within=True, quantized_as="nf4"), GROUPS) == found["nf4"]
    with pytest.raises(ConfigError, match="other weights"):
        identify_reference(ReferenceChoice(source, found["nf4"], within=True), GROUPS)


def test_the_model_beneath_an_adapter_is_read_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "weights_fingerprint", lambda *_: pytest.fail("its files are read again"))
    source = ModelSource(read_architecture(MODEL), MODEL, MODEL, None)
    assert identify_reference(ReferenceChoice(source, None, within=True), GROUPS, "weights") == "weights"
    monkeypatch.setattr(reference, "weights_fingerprint", lambda *_: "another's")
    assert identify_reference(ReferenceChoice(source, None), GROUPS, "weights") == "another's"


def test_an_adapter_for_a_reference_that_there_is_not_is_refused() -> None:
    config = Config(lora=LoraConfig(lora_rank=2, reference_adapter="adapter"))
    source = ModelSource(read_architecture(MODEL), MODEL, MODEL, None)
    with pytest.raises(ConfigError, match="--reference-adapter does nothing: --objective rmipo has no reference"):
        choose_reference(config, source, LogpNeeds(), 1, resumes=False, recorded=None)
