"""An exported model or adapter on the disk: whether it is whole, what its files are, what its card says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_rmipo.errors import ConfigError

_CARD = "README.md"
_INDEX = "model.safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ENDINGS = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model, or adapter.

    Attributes:
        files: (path within the directory, bytes) of each, in order.
        card: the text of its card.
        metadata: what stands at the card's head, by name.
    """

    files: list[tuple[str, int]]
    card: str
    metadata: dict[str, Any]


def read_export(directory: Path) -> Exported:
    """What is to be published of a directory: the files of a model or an adapter, and no others.

    Raises:
        ConfigError: it is no whole model or adapter, or has no card, or one whose head the Hub could not read.
    """
    is_adapter = (directory / _ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()
    for name in (_ADAPTER_CONFIG if is_adapter else "config.json", _CARD):
        if not (directory / name).is_file():
            raise ConfigError(
                f"{directory} holds no {name}. Name a directory that --save-hf, --save-adapter or convert_megatron_to_hf.py "
                "wrote."
            )
    needed = {_ADAPTER_WEIGHTS} if is_adapter else _weight_files(directory)
    if missing := sorted(needed - {path.name for path in directory.glob("*.safetensors")}):
        raise ConfigError(f"{directory} lacks {', '.join(missing)}: it is not whole. Export it again.")
    card = (directory / _CARD).read_text(encoding="utf-8")
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix in _ENDINGS)
    files = [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in paths]
    return Exported(files, card, _metadata(directory / _CARD, card))


def _weight_files(directory: Path) -> set[str]:
    """Names of the files of a model's weights, as its index says."""
    path = directory / _INDEX
    if not path.is_file():
        return {"model.safetensors"}
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not an index of weights ({error}).") from error


def _metadata(path: Path, card: str) -> dict[str, Any]:
    lines = card.splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    try:
        fields = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: its head is not valid YAML, which the Hub would refuse: {error}") from error
    return fields if isinstance(fields, dict) else {}
