"""What computes answers: vLLM where it is installed, else transformers."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.generation.requests import Engine

ENGINES = ("auto", "vllm", "transformers")


def choose_engine(choice: str) -> str:
    """``vllm`` or ``transformers``.

    Raises:
        ConfigError: vLLM was asked for and is not installed.
    """
    has_vllm = find_spec("vllm") is not None
    if choice == "vllm" and not has_vllm:
        raise ConfigError(
            "--engine vllm: vLLM is not installed here. Install it in an environment of its own, since it brings its own torch "
            "(pip install vllm), or use --engine transformers."
        )
    if choice == "auto":
        return "vllm" if has_vllm else "transformers"
    return choice


def build_engine(
    name: str,
    model: Path,
    end_ids: Collection[int],
    *,
    dtype: str,
    batch_size: int | None,
    tensor_model_parallel_size: int,
) -> Engine:
    """Load a model.

    Args:
        name: ``vllm`` or ``transformers``.
        model: a Hugging Face model directory.
        end_ids: the tokens that end an answer.
        dtype: ``bf16`` or ``fp32``.
        batch_size: requests at once; None for the engine's own.
        tensor_model_parallel_size: over how many GPUs vLLM shares the model.

    Raises:
        ConfigError: the model cannot be loaded, or the engine cannot do what was asked.
    """
    if name == "vllm":
        from megatron_rmipo.generation.vllm_engine import VllmEngine

        return VllmEngine(model, end_ids, dtype=dtype, batch_size=batch_size, num_gpus=tensor_model_parallel_size)
    if tensor_model_parallel_size != 1:
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor_model_parallel_size}: the engine transformers uses one device. "
            "Use --engine vllm, or leave the flag out."
        )
    from megatron_rmipo.generation.transformers_engine import TransformersEngine

    return TransformersEngine(model, end_ids, dtype=dtype, batch_size=batch_size)
