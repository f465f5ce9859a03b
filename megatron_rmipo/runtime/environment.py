"""What is installed and set: packages that break a run or that it lacks, and what its numbers depend on besides its flags."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

import megatron_rmipo
from megatron_rmipo.errors import ConfigError

_DISTRIBUTIONS = (
    *("torch", "megatron-core", "transformers", "numpy", "transformer-engine", "flash-attn", "triton", "apex"),
    "megatron-bridge",
)
# What libraries compute, or in which order they add, depends on these. Not on the others of theirs, which place work and buffers.
_NUMERIC_PREFIXES = ("NVTE_",)
_NUMERIC_VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "MKL_CBWR"),
)
# Megatron-Core's modules that tell developers what it will drop, or how to call it; a user can mend nothing of it.
_ANNOUNCING = (
    *("megatron.core.models.gpt.gpt_model", "megatron.core.dist_checkpointing.strategies.torch"),
    "megatron.core.distributed.distributed_data_parallel",
)
_TO_DEVELOPERS = ("deprecated", "callers should")


def check_environment(trackers: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse an environment in which a run would fail late or hang. Cheap; imports none of what it looks for.

    Args:
        trackers: packages that the run tells of itself -> the flag that asks for it.

    Raises:
        ConfigError: a package of the wrong kind or a missing one, with the command that mends it.
    """
    apex = _package_directory("apex")
    # Megatron-Core imports whatever is called apex. NVIDIA's holds these two; the one on PyPI is a web toolkit.
    if apex is not None and not ((apex / "multi_tensor_apply").is_dir() and (apex / "optimizers").is_dir()):
        raise ConfigError(
            f"{apex}: this 'apex' is not NVIDIA's (the PyPI project of that name is another one, for the Pyramid web framework), "
            "and Megatron-Core would import it. Remove it with 'pip uninstall apex'. NVIDIA's is optional and built from its "
            "source: see README.md, 'NVIDIA's apex'."
        )
    if importlib.util.find_spec("psutil") is None:
        raise ConfigError("psutil is missing; without it Megatron-Core hangs while saving a checkpoint. Run: pip install psutil")
    for name, flag in trackers.items():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{flag}: {name} is not installed. Run: pip install 'megatron-rmipo[{name}]', or leave it out")


def hide_deprecation_banners() -> None:
    """Keep what Megatron-Core (0.19) tells developers, of GPTModel, its saving and its DDP, off the screen. Idempotent."""
    for name in _ANNOUNCING:
        logging.getLogger(name).addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    text = record.getMessage().lower()
    return record.levelno != logging.WARNING or not any(words in text for words in _TO_DEVELOPERS)


def costs_of_missing_kernels() -> list[str]:
    """What it costs that Transformer Engine or apex is not installed, a line each with the remedy; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    te, apex = (_package_directory(name) is not None for name in ("transformer_engine", "apex"))
    get_te, get_apex = "pip install 'megatron_rmipo[te]'", "README.md, 'NVIDIA's apex and Transformer Engine'"
    lines = []
    if not te and not apex:
        lines.append(
            "neither Transformer Engine nor apex is installed: Adam takes temporaries of 4 bytes a parameter, and the gradient "
            f"norm waits for the GPU once a tensor. {get_te}, or {get_apex}"
        )
    if not te:
        lines.append(f"Transformer Engine is not installed: rotary embeddings are not one kernel. {get_te}")
    if not apex:
        lines.append(f"apex is not installed: gradients of the layers' weights are not summed in their buffer. {get_apex}")
    return lines


def _package_directory(name: str) -> Path | None:
    """Where a top-level package or module lies, or None; a single-file module counts by its file."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported already, by something that set no __spec__
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def numeric_environment(local_rank: int) -> dict[str, Any]:
    """What a rank's numbers depend on besides flags and files, by name: software, device, variables of the environment.

    Without CUDA the number of threads is among it, since sums are cut by it.

    Args:
        local_rank: the number of this rank's device.
    """
    facts: dict[str, Any] = {
        "version of Python": platform.python_version(),
        "version of megatron_rmipo": f"{megatron_rmipo.__version__} (source {_source_digest()})",
        **{f"version of {name}": _version(name) for name in _DISTRIBUTIONS},
    }
    if torch.cuda.is_available():
        # More ranks than devices are refused later.
        facts["device"] = torch.cuda.get_device_name(local_rank % torch.cuda.device_count())
    else:
        facts["device"] = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        facts["number of threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    facts["torch.get_float32_matmul_precision()"] = torch.get_float32_matmul_precision()
    set_here = (name for name in os.environ if name in _NUMERIC_VARIABLES or name.startswith(_NUMERIC_PREFIXES))
    return facts | {f"environment variable {name}": os.environ[name] for name in sorted(set_here)}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _source_digest() -> str:
    """Of this package's modules: copies of one version that were edited, or not updated, differ."""
    root = Path(megatron_rmipo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def launched_at() -> float:
    """When the process that started this one began, seconds since 1970; torchrun outlives the ranks that it starts anew."""
    return float(psutil.Process(os.getppid()).create_time())
