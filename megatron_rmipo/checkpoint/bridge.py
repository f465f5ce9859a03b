"""Models of families that are not known here, through NVIDIA's Megatron-Bridge: built, loaded, scored by the seam, exported.

Interface: ``AutoBridge`` of Megatron-Bridge 0.6 and 0.7 (``megatron/bridge/models/conversion/auto_bridge.py``) and its model
providers (``megatron/bridge/models/model_provider.py``). It was never run with the package itself, which needs CUDA.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch

from megatron_rmipo.errors import ConfigError, ConversionError
from megatron_rmipo.model.adopt import adopt_policy
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups

NO_BRIDGE = (
    "NVIDIA's Megatron-Bridge is not installed. It needs CUDA and Python 3.12: pip install megatron-bridge, or NVIDIA's NeMo "
    "container"
)


@dataclasses.dataclass(frozen=True)
class BridgedPolicy:
    """A policy that Megatron-Bridge built, and what writes it.

    Attributes:
        policy: this rank's part, with the weights of the Hugging Face model.
        vocab_size: real vocabulary, without padding.
        bridge: the ``AutoBridge`` of the model.
        groups: the process groups of this rank.
    """

    policy: PolicyModel
    vocab_size: int
    bridge: Any
    groups: ProcessGroups

    def export(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory. All ranks call it together.

        Raises:
            ConversionError: the directory holds something, or Megatron-Bridge cannot write the model.
        """
        on_first_rank(self.groups.world, lambda: _check_free(directory))

        def write() -> None:
            try:
                self.bridge.save_hf_pretrained([self.policy], str(directory), show_progress=False)
            except (ValueError, NotImplementedError, OSError) as error:
                raise ConversionError(f"{directory}: Megatron-Bridge could not write the model: {error}") from error

        on_every_rank(self.groups.world, write)


def build_bridged_policy(
    hf_dir: Path,
    groups: ProcessGroups,
    *,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    attention_backend: str = "auto",
    chunk_size: int = 4096,
    **overrides: Any,
) -> BridgedPolicy:
    """Build this rank's part of a model with the weights of a Hugging Face directory. All ranks call it together.

    Args:
        hf_dir: a local directory with config.json; code in it is not run.
        groups: the process groups of this rank.
        max_length: most tokens of a prompt with one of its responses.
        dtype: fp32 or bf16 parameters and activations.
        sequence_parallel: shard norms and residuals along the row over the tensor-parallel group.
        attention_backend, chunk_size: as of :func:`megatron_rmipo.model.build.build_policy`.
        **overrides: further fields of the model's provider, which is a TransformerConfig, such as recomputation.

    Raises:
        ConfigError: Megatron-Bridge is not installed, its provider lacks a field, or what it builds cannot be scored exactly.
        ConversionError: no model there, or none that Megatron-Bridge takes.
    """
    bridge, provider = on_every_rank(groups.world, lambda: _provider_of(Path(hf_dir)))
    settings = {**_settings(groups, max_length, dtype, sequence_parallel), **overrides}
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise ConfigError(f"{hf_dir}: Megatron-Bridge's {type(provider).__name__} has no field {name}, to be {value!r}.")
        setattr(provider, name, value)
    provider.finalize()
    models = provider.provide_distributed_model(
        # The trainer wraps, in what it chooses.
        wrap_with_ddp=False,
        mixed_precision_wrapper=None,
        use_cpu_initialization=not torch.cuda.is_available(),
        pg_collection=groups.megatron_collection(),
    )
    assert len(models) == 1, "a virtual pipeline was not asked for"
    adopted = {"vocab_size": provider.vocab_size, "chunk_size": chunk_size, "attention_backend": attention_backend}
    policy = on_every_rank(groups.world, lambda: adopt_policy(models[0], **adopted))
    return BridgedPolicy(policy, provider.vocab_size, bridge, groups)


def _provider_of(hf_dir: Path) -> tuple[Any, Any]:
    """The bridge of a model, and what builds it with its weights."""
    try:
        auto_bridge = importlib.import_module("megatron.bridge").AutoBridge
    except ImportError as error:
        raise ConfigError(f"{NO_BRIDGE} ({error}).") from error
    if not (hf_dir / "config.json").is_file():
        raise ConversionError(f"{hf_dir} holds no config.json. Name a Hugging Face model directory; nothing is downloaded.")
    try:
        bridge = auto_bridge.from_hf_pretrained(str(hf_dir))
        return bridge, bridge.to_megatron_provider(load_weights=True)
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConversionError(f"{hf_dir}: Megatron-Bridge does not take this model: {error}") from error


def _settings(groups: ProcessGroups, max_length: int, dtype: torch.dtype, sequence_parallel: bool) -> dict[str, Any]:
    """What :func:`megatron_rmipo.model.build.transformer_config` says of packed rows and of the layout, for a provider."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expert_tp.size(),
        "sequence_parallel": sequence_parallel,
        "seq_length": max_length,
        "should_pad_vocab": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": groups.pp_size > 1,
    }
    if groups.pp_size > 1:
        # The default is refused with variable lengths.
        settings["moe_token_dispatcher_type"] = "alltoall"
    return settings


def _check_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConversionError(f"{directory} exists and holds something. Name another directory.")
