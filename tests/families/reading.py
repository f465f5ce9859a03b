"""Configs as they are published, written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture


def read(directory: Path, config: dict[str, Any], **changes: Any) -> ModelArchitecture:
    """The architecture of a config with some fields changed."""
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return read_architecture(directory)


def refusal(directory: Path, config: dict[str, Any], **changes: Any) -> str:
    """What a config with some fields changed is refused with."""
    with pytest.raises(ConversionError) as caught:
        read(directory, config, **changes)
    assert str(directory) in str(caught.value)
    return str(caught.value)
