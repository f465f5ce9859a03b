"""An exported model on the disk: whether it is whole, what its files are, what its card says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_rmipo.errors import ConfigError

_CARD = "README.md"
_INDEX = "model.safetensors.index.json"
_ENDINGS = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        files: (path within the directory, bytes) of each, in order.
        card: the text of its card.
        metadata: what stands at the card's head, by name.
    """

    files: list[tuple[str, int]]
    card: str
    metadata: dict[str, Any]


def read_export(directory: Path) -> Exported:
    """What is to be published of a directory: the files of a model, and no others.

    Raises:
        ConfigError: it is no whole model, or has no card, or one whose head the Hub could not read.
    """
    for name in ("config.json", _CARD):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} holds no {name}. Name a directory that --save-hf or convert_megatron_to_hf.py wrote.")
    weights = {path.name for path in directory.glob("*.safetensors")}
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8")) if (directory / _INDEX).is_file() else None
        needed = {"model.safetensors"} if index is None else set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{directory / _INDEX}: not an index of weights ({error}).") from error
    if missing := sorted(needed - weights):
        raise ConfigError(f"{directory} lacks {', '.join(missing)}: it is not whole. Export the model again.")
    card = (directory / _CARD).read_text(encoding="utf-8")
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix in _ENDINGS)
    files = [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in paths]
    return Exported(files, card, _metadata(directory / _CARD, card))


def _metadata(path: Path, card: str) -> dict[str, Any]:
    lines = card.splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    try:
        fields = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: its head is not valid YAML, which the Hub would refuse: {error}") from error
    return fields if isinstance(fields, dict) else {}
