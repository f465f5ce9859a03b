"""What travels with weights: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron_rmipo.errors import ConversionError

_ASSET_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)


def copy_hf_assets(source_dir: Path, target_dir: Path) -> list[str]:
    """Copy config, generation config, tokenizer and chat templates, whichever are there.

    Args:
        source_dir: a Hugging Face model directory, or the ``hf/`` folder of a checkpoint.
        target_dir: made if missing.

    Returns:
        Names of what was copied.

    Raises:
        ConversionError: ``source_dir`` has no config.json.
    """
    if not (source_dir / "config.json").is_file():
        raise ConversionError(f"{source_dir} holds no config.json to put beside the weights.")
    target_dir.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted({path for pattern in _ASSET_PATTERNS for path in source_dir.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target_dir / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target_dir / path.name)
        copied.append(path.name)
    return copied


def set_config_dtype(config_path: Path, dtype: torch.dtype) -> None:
    """Make a config.json tell the dtype its weights are stored in."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    field = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(field) != name:
        config[field] = name
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
