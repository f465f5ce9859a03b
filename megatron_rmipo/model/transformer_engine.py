"""What needs Transformer Engine, and what Transformer Engine needs: checks of flags, before any model is built."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.families.architecture import ModelArchitecture

# Recipe of fp8 -> what the sides of its matrix products are multiples of, tokens among them; least compute capability. Blockwise
# products do with 16, but sequence parallelism gathers whole blocks of 128 x 128.
_RECIPES = {"delayed": (16, (8, 9)), "tensorwise": (16, (8, 9)), "blockwise": (128, (9, 0)), "mxfp8": (32, (10, 0))}


def fp8_multiple(model: ModelConfig) -> int:
    """What the sides of the layers' matrix products have to be multiples of, tokens among them; 1 without fp8."""
    return _RECIPES[_recipe(model)][0] if model.fp8_format else 1


def _recipe(model: ModelConfig) -> str:
    return model.fp8_recipe or "delayed"


def transformer_engine_problems(model: ModelConfig) -> Iterator[str]:
    """Faults of the flags that need Transformer Engine, a line each, with the remedy."""
    layers = ["--transformer-impl transformer_engine"] if model.transformer_impl == "transformer_engine" else []
    kernels = ["--attention-backend te"] if model.attention_backend == "te" else []
    if model.fp8_format:
        kernels.append(f"--fp8-format {model.fp8_format}")
    elif model.fp8_recipe:
        yield "--fp8-recipe does nothing without --fp8-format"
    if model.fp8_format and model.transformer_impl == "local":
        yield f"--fp8-format {model.fp8_format} needs Transformer Engine's layers; leave --transformer-impl local out"
    if not model.bf16:
        yield from (f"{flag} needs --bf16" for flag in kernels)
    if not transformer_engine_available():
        yield from (f"{flag}: {NO_TRANSFORMER_ENGINE}" for flag in (*layers, *kernels))
    elif model.fp8_format:
        needed, found = _RECIPES[_recipe(model)][1], torch.cuda.get_device_capability()
        if found < needed:
            yield (
                f"--fp8-recipe {_recipe(model)} needs a GPU of compute capability {needed[0]}.{needed[1]} or more; this one has "
                f"{found[0]}.{found[1]}"
            )


def fp8_width_problems(model: ModelConfig, arch: ModelArchitecture, tensor_model_parallel_size: int) -> Iterator[str]:
    """Widths of a rank's share of the model that fp8 cannot multiply; the tensor-parallel size must divide the model."""
    multiple, size = fp8_multiple(model), tensor_model_parallel_size
    if arch.latent is None:
        inputs = {"queries, keys and values": (arch.query_size + 2 * arch.key_size) // size}
    else:
        inputs = {
            "latent of queries": arch.latent.q_lora_rank or arch.hidden_size,
            "queries": arch.query_size // size,
            "latent of keys and values": arch.latent.kv_lora_rank,
            "that and the turned key": arch.latent.key_value_down_size,
            "keys and values": arch.key_value_up_size // size,
        }
    outputs = {"attention output": arch.context_size // size, "MLP": arch.ffn_hidden_size // size}
    widths = {"hidden size": arch.hidden_size, **inputs, **outputs}
    odd = [f"{name} {width}" for name, width in widths.items() if width % multiple]
    if odd:
        yield (
            f"--fp8-format {model.fp8_format} needs widths that are multiples of {multiple} (--fp8-recipe {_recipe(model)}); at "
            f"--tensor-model-parallel-size {size} they are: {', '.join(odd)}"
        )


def memory_machine_problems(config: Config) -> Iterator[str]:
    """Flags of memory that this machine cannot do, or that would do nothing on it."""
    memory = config.memory
    if memory.optimizer_cpu_offload and not torch.cuda.is_available():
        yield "--optimizer-cpu-offload needs CUDA; without it the state is on the host already. Leave it out"
    elif memory.use_precision_aware_optimizer and torch.cuda.is_available() and not transformer_engine_available():
        yield f"--use-precision-aware-optimizer: {NO_TRANSFORMER_ENGINE}"
    if not memory.fine_grained_activation_offloading:
        return
    if config.model.transformer_impl == "local":
        yield "--fine-grained-activation-offloading needs Transformer Engine's layers; leave --transformer-impl local out"
    elif not transformer_engine_available():
        yield f"--fine-grained-activation-offloading: {NO_TRANSFORMER_ENGINE}"
    elif os.environ.get("NVTE_CPU_OFFLOAD_V1") != "1":
        # Megatron-LM's rule from Transformer Engine 2.10 on; those before do not read it.
        yield "--fine-grained-activation-offloading needs NVTE_CPU_OFFLOAD_V1=1 in the environment, or weights would go, too"


NO_TRANSFORMER_ENGINE = (
    "Transformer Engine is not installed, or there is no GPU. Install the extra with pip install 'megatron_rmipo[te]' on a GPU "
    "machine, or leave the flag out."
)


def transformer_engine_available() -> bool:
    """Whether Megatron-Core found Transformer Engine, and there is a GPU for it."""
    from megatron.core.extensions import transformer_engine

    return bool(getattr(transformer_engine, "HAVE_TE", False)) and torch.cuda.is_available()


def transformer_engine_layers(model: ModelConfig) -> bool:
    """Whether the layers are Transformer Engine's, by the flags and by what is installed."""
    return model.transformer_impl != "local" and transformer_engine_available()
