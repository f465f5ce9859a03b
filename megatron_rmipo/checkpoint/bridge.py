"""Models through NVIDIA's Megatron-Bridge, whatever their family: built, loaded, scored by the seam, exported.

Interface: ``AutoBridge`` of Megatron-Bridge 0.6 and 0.7 (``megatron/bridge/models/conversion/auto_bridge.py``) and its model
providers (``megatron/bridge/models/model_provider.py``). With 0.6.2 itself it was run on the CPU alone, with Megatron's local
layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles
from megatron_rmipo.checkpoint.megatron.directory import hf_assets_directory
from megatron_rmipo.checkpoint.megatron.record import Iteration
from megatron_rmipo.checkpoint.whole_directories import check_output_directory, new_directory
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import CheckpointError, ConfigError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.foreign import foreign_architecture
from megatron_rmipo.model.adopt import attach_model, scoring_problems
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.model.policy import Policy, PolicyModel
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest

NO_BRIDGE = (
    "NVIDIA's Megatron-Bridge is not installed. It needs CUDA and Python 3.12: pip install megatron-bridge, or NVIDIA's NeMo "
    "container"
)
# Of its messages.
_SHOWN_LINES = 6


@dataclasses.dataclass(frozen=True)
class BridgedPolicy:
    """A policy that Megatron-Bridge built, and what writes it.

    Attributes:
        policy: this rank's part.
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
        _export(self.bridge, [self.policy], directory, self.groups, "the directory")


@dataclasses.dataclass(frozen=True)
class ThroughBridge:
    """Megatron-Bridge as the :class:`megatron_rmipo.checkpoint.makers.Maker` of a run's models.

    Attributes:
        hf_dir: the Hugging Face model of ``--load-hf``, whose files checkpoints of a run are built and exported by.
    """

    hf_dir: Path

    def config_of(self, hf_dir: Path) -> Path:
        """Its own: adapters are not taken."""
        return hf_dir

    def read(self, hf_dir: Path) -> ModelArchitecture:
        """The sizes of a model, as its provider has them.

        Raises:
            ConfigError: Megatron-Bridge is not installed, or the model cannot be scored exactly or is one of experts.
            ConversionError: no model there, or none that Megatron-Bridge takes.
        """
        bridge = _open(hf_dir)
        with _told(f"{hf_dir}: Megatron-Bridge does not take this model"):
            provider = bridge.to_megatron_provider(load_weights=False)
            problems = list(scoring_problems(provider))
            if provider.num_moe_experts:
                problems.append(
                    f"num_moe_experts {provider.num_moe_experts}: load and losses of experts are built for families that are "
                    "known here alone"
                )
            if problems:
                raise ConfigError(
                    "\n  ".join([f"{hf_dir}: --bridge megatron-bridge cannot train or score this model:", *problems])
                )
            return foreign_architecture(provider, str(hf_dir))

    def check_weights(self, hf_dir: Path, arch: ModelArchitecture) -> None:
        """See that the files of weights are whole; which tensors they must hold, Megatron-Bridge knows.

        Raises:
            ConversionError: they are missing or damaged.
        """
        WeightFiles(hf_dir)

    def assets_of(self, directory: Path, iteration: Iteration) -> Path:
        """``--load-hf``, which the checkpoint must be of.

        Raises:
            CheckpointError: it is of a model with another config, or does not say which.
        """
        kept = hf_assets_directory(directory, iteration) / "config.json"
        if _read_config(kept) != _read_config(self.hf_dir / "config.json"):
            raise CheckpointError(
                f"{kept} is not the config.json of --load-hf {self.hf_dir}, by which --bridge builds the model. Name the Hugging "
                "Face model that the run began with."
            )
        return self.hf_dir

    def build(self, hf_dir: Path, arch: ModelArchitecture, config: Config, groups: ProcessGroups, *, weights: bool) -> Policy:
        """As :meth:`megatron_rmipo.checkpoint.makers.Maker.build`."""
        model = config.model
        policy = build_bridged_policy(
            hf_dir,
            groups,
            # As the model has it: learned positions are as many.
            max_length=arch.max_position_embeddings,
            dtype=torch.bfloat16 if model.bf16 else torch.float32,
            sequence_parallel=config.parallel.sequence_parallel,
            attention_backend=model.attention_backend,
            chunk_size=model.logprob_chunk_size,
            load_weights=weights,
            make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
            recompute_granularity=model.recompute_granularity,
            recompute_method=model.recompute_method,
            recompute_num_layers=model.recompute_num_layers,
            recompute_modules=config.memory.recompute_modules,
        ).policy
        policy.architecture = arch
        return Policy([policy])

    def export(
        self,
        policy: Policy,
        arch: ModelArchitecture,
        hf_dir: Path,
        save_dir: Path,
        *,
        dtype: str | None,
        groups: ProcessGroups,
        stop: StopRequest | None,
        beside: Beside = NOTHING_ELSE,
    ) -> None:
        """As :meth:`megatron_rmipo.checkpoint.makers.Maker.export`; asked to stop, it is before the export alone."""
        assert dtype is None, "refused with the flags"
        if stop is not None:
            stop.check("", groups.world)
        _export(on_every_rank(groups.world, lambda: _open(hf_dir)), list(policy), save_dir, groups, "--save-hf", beside)


def _export(
    bridge: Any,
    chunks: Sequence[torch.nn.Module],
    directory: Path,
    groups: ProcessGroups,
    flag: str,
    beside: Beside = NOTHING_ELSE,
) -> None:
    """Write a policy; the directory appears when it is whole. All ranks call it together."""
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            check_output_directory(directory, flag)
            return stack.enter_context(new_directory(directory))

        partial = on_first_rank(groups.world, begin)

        def write() -> None:
            with _told(f"{directory}: Megatron-Bridge could not write the model"):
                bridge.save_hf_pretrained(list(chunks), str(partial), show_progress=False)

        on_every_rank(groups.world, write)

        def end() -> None:
            beside.write(partial)
            stack.close()

        on_first_rank(groups.world, end)


def build_bridged_policy(
    hf_dir: Path,
    groups: ProcessGroups,
    *,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    attention_backend: str = "auto",
    chunk_size: int = 4096,
    load_weights: bool = True,
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
        load_weights: False leaves them random.
        **overrides: further fields of the model's provider, which is a TransformerConfig, such as recomputation.

    Raises:
        ConfigError: Megatron-Bridge is not installed, its provider lacks a field, tensor parallelism does not divide the
            vocabulary, or what it builds cannot be scored exactly.
        ConversionError: no model there, or none that Megatron-Bridge takes, or can build on this machine.
    """
    bridge, provider = on_every_rank(groups.world, lambda: _provider_of(Path(hf_dir), load_weights=load_weights))
    settings = {**_settings(groups, max_length, dtype, sequence_parallel), **overrides}
    if provider.vocab_size % groups.tp_size:
        raise ConfigError(
            f"--tensor-model-parallel-size {groups.tp_size} does not divide the vocabulary of {provider.vocab_size} tokens in "
            f"{hf_dir}. It would be padded, and Megatron-Bridge exports the padding, too: take a size that divides it."
        )
    settings.setdefault("should_pad_vocab", False)
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise ConfigError(f"{hf_dir}: Megatron-Bridge's {type(provider).__name__} has no field {name}, to be {value!r}.")
        setattr(provider, name, value)
    # What it asks for and this machine has not, such as kernels of Transformer Engine, it finds here.
    with _told(f"{hf_dir}: Megatron-Bridge cannot build this model here"):
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
    on_every_rank(groups.world, lambda: attach_model(models[0], **adopted))
    # What the trainer does with a policy it does with an attached model, too.
    policy: Any = unwrapped(models[0])
    return BridgedPolicy(policy, provider.vocab_size, bridge, groups)


def _provider_of(hf_dir: Path, *, load_weights: bool) -> tuple[Any, Any]:
    """The bridge of a model, and what builds it."""
    bridge = _open(hf_dir)
    with _told(f"{hf_dir}: Megatron-Bridge does not take this model"):
        return bridge, bridge.to_megatron_provider(load_weights=load_weights)


def _open(hf_dir: Path) -> Any:
    """The bridge of a model."""
    try:
        auto_bridge = importlib.import_module("megatron.bridge").AutoBridge
    except ImportError as error:
        raise ConfigError(f"{NO_BRIDGE} ({error}).") from error
    if not (hf_dir / "config.json").is_file():
        raise ConversionError(f"{hf_dir} holds no config.json. Name a Hugging Face model directory; nothing is downloaded.")
    with _told(f"{hf_dir}: Megatron-Bridge does not take this model"):
        return auto_bridge.from_hf_pretrained(str(hf_dir))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Make what Megatron-Bridge raises a fault that is told, by the first lines of its text: it may list all that it knows."""
    try:
        yield
    except (ValueError, NotImplementedError, AttributeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConversionError(f"{what}: {' '.join(lines[:_SHOWN_LINES])}") from error


def _read_config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def _settings(groups: ProcessGroups, max_length: int, dtype: torch.dtype, sequence_parallel: bool) -> dict[str, Any]:
    """Of a provider, what :mod:`megatron_rmipo.model.megatron_config` says of packed rows and of the layout."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expert_tp.size(),
        "sequence_parallel": sequence_parallel,
        "seq_length": max_length,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": groups.pp_size > 1,
        # The passes read what a stage has sent on.
        "deallocate_pipeline_outputs": False,
        # What its own training had; of preference data it is no matter.
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
    }
    if groups.pp_size > 1:
        # The default is refused with variable lengths.
        settings["moe_token_dispatcher_type"] = "alltoall"
    return settings
