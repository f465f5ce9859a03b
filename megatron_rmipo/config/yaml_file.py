"""A YAML file of flags: a flat mapping, every entry remembered with its file and line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_rmipo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Given:
    """A raw value and where it was found, as messages name it."""

    raw: object
    source: str


def commented_yaml(values: Mapping[str, object], comments: Mapping[str, str]) -> str:
    """A flat mapping as YAML that :func:`read_yaml` reads back, a line an entry, each with its comment, aligned."""
    # A list on its line; a mapping of scalars alone would be one in braces with that.
    styles = {key: None if isinstance(value, list) and value else False for key, value in values.items()}
    lines = {
        key: yaml.safe_dump({key: value}, default_flow_style=styles[key], width=10_000, allow_unicode=True).rstrip("\n")
        for key, value in values.items()
    }
    column = min(60, max(map(len, lines.values()))) + 2
    return "\n".join(f"{line:<{column}}# {comments[key]}" for key, line in lines.items()) + "\n"


def read_yaml(path: Path) -> dict[str, Given]:
    """The entries of a flat YAML mapping, each with its file and line.

    Raises:
        ConfigError: the file is missing, is not YAML or not a flat mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: the file cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"--config {path}: expected lines of the form 'flag_name: value'.")
        given: dict[str, Given] = {}
        for key_node, value_node in root.value:
            key = str(loader.construct_object(key_node)).replace("-", "_")
            source = f"{path}:{key_node.start_mark.line + 1}: {key}"
            if isinstance(value_node, yaml.MappingNode):
                raise ConfigError(f"{source}: the file is flat; put the entries below it at the left margin and remove '{key}:'.")
            if key in given:
                raise ConfigError(f"{source}: given twice, first in {given[key].source.rpartition(':')[0]}.")
            given[key] = Given(loader.construct_object(value_node, deep=True), source)
        return given
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
