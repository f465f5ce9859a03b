"""Which model a plan is for: a Hugging Face config of the user's, or one of a few that come with this package."""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import architecture_of, read_architecture, read_json

# The published configs' fields, those alone that say what is computed.
_PATH = Path(__file__).with_name("shapes.json")


@functools.cache
def _shapes() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_PATH.read_text(encoding="utf-8"))
    return found


def shape_names() -> list[str]:
    """Models that are known by name."""
    return list(_shapes())


def read_shape(name: str) -> ModelArchitecture:
    """The model of a directory with a config.json, of such a file, or of a name.

    Args:
        name: which; a name goes where there is no such path.

    Raises:
        ConversionError: there is neither, or the config is of no model that is built here.
    """
    path = Path(name)
    if path.is_file():
        return architecture_of(read_json(path), path)
    if not path.exists() and name.lower() in _shapes():
        return architecture_of(_shapes()[name.lower()], _PATH)
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), _shapes(), n=1)
        raise ConversionError(
            f"--hf-model {name}: there is no such directory or config.json, and no shape of that name"
            f"{f'; did you mean {near[0]}?' if near else '.'} Known are {', '.join(_shapes())}."
        )
    return read_architecture(path)
