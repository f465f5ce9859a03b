"""Who says what a Hugging Face model is, builds it and writes it: the families that are known here, or Megatron-Bridge."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import torch

from megatron_rmipo.checkpoint.bridge import ThroughBridge
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.megatron.directory import hf_assets_directory
from megatron_rmipo.checkpoint.megatron.record import Iteration
from megatron_rmipo.checkpoint.peft.reading import model_directory, refuse_idle_base
from megatron_rmipo.config.flag_problems import bridge_problems, refuse
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest


class Maker(Protocol):
    """What makes models of Hugging Face directories, and such directories of models."""

    def config_of(self, hf_dir: Path) -> Path:
        """The directory of its config and tokenizer: another one where it holds an adapter alone. No communication.

        Raises:
            ConversionError: it is not there.
        """

    def read(self, hf_dir: Path) -> ModelArchitecture:
        """What the config of a directory says. No communication.

        Raises:
            RmipoError: no model there, or none that it can make.
        """

    def check_weights(self, hf_dir: Path, arch: ModelArchitecture) -> None:
        """See by their headers that a directory holds the weights of a model. No communication.

        Raises:
            ConversionError: they are missing or damaged.
        """

    def assets_of(self, directory: Path, iteration: Iteration) -> Path:
        """The directory whose config says what the model of a checkpoint is, with its tokenizer. No communication.

        Raises:
            CheckpointError: there is none.
        """

    def build(self, hf_dir: Path, arch: ModelArchitecture, config: Config, groups: ProcessGroups, *, weights: bool) -> Policy:
        """This rank's part of the model of a directory, with its weights or with random ones. All ranks call it together.

        Raises:
            RmipoError: it cannot be built, or not loaded.
        """

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
        """Write a model as a Hugging Face directory, which appears when it is whole. All ranks call it together.

        Args:
            policy: this rank's part, not wrapped.
            arch: what it is.
            hf_dir: holds its config and tokenizer.
            save_dir: missing or empty.
            dtype: what the flags say of the files' dtype; None where they say nothing.
            groups: the process groups of this rank.
            stop: looked at now and then; a signal ends the export. None where it is not to be ended.
            beside: what else belongs to the model; of the first rank.

        Raises:
            ConversionError: on every rank: it cannot be written.
            RunStopped: on every rank: it was stopped, and nothing of it is left.
        """


@dataclasses.dataclass(frozen=True)
class KnownFamilies:
    """The :class:`Maker` of families that are known here.

    Attributes:
        base: the base model of adapters that are merged as they are read; None: the directory that an adapter names.
        lora: the flags of adapters that are trained.
        named_base: Hugging Face model that the flags name as the frozen one of adapters; None: the one that they were trained on.
    """

    base: Path | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    named_base: Path | None = None

    def config_of(self, hf_dir: Path) -> Path:
        """An adapter's base model's."""
        return model_directory(hf_dir, self.base)

    def read(self, hf_dir: Path) -> ModelArchitecture:
        """By what its family says."""
        return read_architecture(self.config_of(hf_dir))

    def check_weights(self, hf_dir: Path, arch: ModelArchitecture) -> None:
        """Exactly the tensors of its family's table."""
        open_weights(hf_dir, arch, self.base)

    def assets_of(self, directory: Path, iteration: Iteration) -> Path:
        """The checkpoint's own."""
        return hf_assets_directory(directory, iteration)

    def build(self, hf_dir: Path, arch: ModelArchitecture, config: Config, groups: ProcessGroups, *, weights: bool) -> Policy:
        """Of Megatron-Core's layers; each rank reads no more than its slices of the weights."""
        model = build_model(arch, config, groups)
        if weights:
            load_hf_weights(model, hf_dir, arch, groups=groups, read=config.model.hf_read, base=self.base)
        return model

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
        """In the dtype of the flags, or in that of the model it was made from."""
        stored = getattr(torch, dtype or arch.dtype)
        export_hf(policy, arch, hf_dir, save_dir, dtype=stored, groups=groups, stop=stop, beside=beside)


KNOWN_FAMILIES = KnownFamilies()


def maker_of(config: Config, *, adapters: bool = True) -> Maker:
    """Who makes the models of a command.

    Args:
        config: its flags.
        adapters: whether it makes the model that is trained, with the adapters that the flags ask for.

    Raises:
        ConfigError: ``--bridge`` is given, and with it flags that do nothing for such a model.
        ConversionError: ``--base-hf`` is given, and nothing holds an adapter.
    """
    model = config.model
    if model.bridge is None:
        refuse_idle_base(model.base_hf, model.load_hf, model.reference_hf)
        base, load_hf = (None if name is None else Path(name) for name in (model.base_hf, model.load_hf))
        return KnownFamilies(base, config.lora, load_hf) if adapters else KnownFamilies(base)
    refuse(list(bridge_problems(config)))
    assert model.load_hf is not None, "refused with the flags"
    return ThroughBridge(Path(model.load_hf))
