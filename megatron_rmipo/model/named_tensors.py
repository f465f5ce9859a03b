"""The parameters of this rank's part of a model by the names that checkpoints have for them. Needs no Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn import Module, ModuleList

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place
from megatron_rmipo.families.parameter_names import TensorId, canonical_names
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import tensors_of

if TYPE_CHECKING:
    from megatron_rmipo.runtime.groups import ProcessGroups

# What adapters add to the modules of a model; no checkpoint of the model itself holds it.
ADAPTER, REFERENCE_ADAPTER = "adapter", "reference_adapter"


class NamedTensor(NamedTuple):
    """A parameter or buffer.

    Attributes:
        module: that holds it.
        name: in the module.
        full_name: in its chunk.
        known_as: checkpoint name and place, layers counted over all stages, experts over all expert-parallel ranks; None where a
            checkpoint of the model holds no such tensor.
        tensor: itself.
    """

    module: Module
    name: str
    full_name: str
    known_as: TensorId | None
    tensor: Tensor


def named_tensors(model: Module | Sequence[Module], arch: ModelArchitecture, groups: ProcessGroups) -> Iterator[NamedTensor]:
    """The tensors of this rank, adapters' left out.

    The output layer of a tied model, which a last stage holds as a copy, is known under the embedding's name.

    Args:
        model: this rank's GPTModel, wrapped or not, or its chunks.
        arch: the model.
        groups: the process groups of this rank.
    """
    family = FAMILIES[arch.family]
    known = {(rule.megatron, place) for rule, place in tensors_of(arch)}
    first_expert = groups.ep.rank() * arch.experts.num_experts // groups.ep.size() if arch.experts else 0
    for chunk in model if isinstance(model, Sequence | ModuleList) else [model]:
        inner: Any = chunk
        while hasattr(inner, "module"):
            inner = inner.module  # DDP and mixed-precision wrappers
        first_layer = next((layer.layer_number - 1 for layer in inner.decoder.layers), 0)
        layers_each = getattr(inner, "layers_each", 1)
        for module, name, full_name, tensor in _tensors(inner):
            if {ADAPTER, REFERENCE_ADAPTER}.intersection(full_name.split(".")):
                continue
            names, local = canonical_names(full_name)
            layer = _counted_from(first_layer, local.layer)
            block = None if layer is None else layer // layers_each
            place = Place(block, _counted_from(first_expert, local.expert))
            if arch.tied_embeddings and names == (family.head,):
                names = (family.embedding,)
            checkpoint_name = next((name for name in names if (name, place) in known), None)
            yield NamedTensor(module, name, full_name, None if checkpoint_name is None else (checkpoint_name, place), tensor)


def _tensors(model: Module) -> Iterator[tuple[Module, str, str, Tensor]]:
    for found in (model.named_parameters(), model.named_buffers()):
        for full_name, tensor in found:
            path, _, name = full_name.rpartition(".")
            yield model.get_submodule(path), name, full_name, tensor


def _counted_from(first: int, number: int | None) -> int | None:
    return None if number is None else first + number
