"""What is installed, beside what this package asks for."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from packaging.requirements import Requirement

from megatron_rmipo.doctor.findings import Finding
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.environment import check_environment

_OURS = "megatron-rmipo"
_SHOWN = ("megatron-core", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "psutil")
# Distribution -> what it is for, and how to get it.
_OPTIONAL = {
    "transformer-engine": ("fused layers and attention", "pip install 'megatron_rmipo[te]'"),
    "flash-attn": ("attention of Transformer Engine on some GPUs", "see its own page; it is not needed"),
    "matplotlib": ("pictures and reports", "pip install 'megatron_rmipo[plots]'"),
    "bitsandbytes": ("--quantize-base", "pip install 'megatron_rmipo[quantize]'"),
    "wandb": ("--wandb-project", "pip install 'megatron_rmipo[wandb]'"),
}
_NEEDS_CUDA = ("transformer-engine", "flash-attn")


def look_at_packages() -> Iterator[Finding]:
    """A finding for each package that matters."""
    yield Finding("Python", "OK", platform.python_version())
    yield _torch()
    bounds = _bounds()
    for name in _SHOWN:
        yield _needed(name, bounds.get(name))
    yield _apex()
    missing = []
    for name, (use, remedy) in _OPTIONAL.items():
        version = _version(name)
        if version is not None:
            yield Finding(name, "OK", version)
        elif name == "transformer-engine" and torch.cuda.is_available():
            yield Finding(name, "WARN", f"not installed; {use} are slower without it", remedy)
        elif name not in _NEEDS_CUDA or torch.cuda.is_available():
            missing.append(f"{name} ({use})")
    if missing:
        yield Finding("not installed", "OK", f"{', '.join(missing)}: optional")


def _torch() -> Finding:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    return Finding("torch", "OK", f"{torch.__version__}, {cuda}" + (f", NCCL {nccl}" if nccl else ""))


def _bounds() -> dict[str, Requirement]:
    try:
        asked = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:  # run from the source, without installing it
        return {}
    return {one.name: one for one in map(Requirement, asked) if one.marker is None}


def _needed(name: str, bounds: Requirement | None) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "FAIL", "not installed", f"pip install {name}")
    if bounds is not None and not bounds.specifier.contains(version, prereleases=True):
        return Finding(name, "WARN", f"{version}, untried", f"pip install '{bounds}'")
    return Finding(name, "OK", version)


def _apex() -> Finding:
    try:
        check_environment()
    except ConfigError as error:
        return Finding("apex", "FAIL", str(error))
    version = _version("apex")
    if version is not None:
        return Finding("apex", "OK", f"{version}, NVIDIA's")
    return Finding("apex", "OK", "not installed; optional (never from PyPI: README.md, 'NVIDIA's apex')")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
