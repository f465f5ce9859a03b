"""What a model family is: the terms in which its file says how Hugging Face writes it and how Megatron names it.

Names of Megatron tensors are those of its distributed checkpoints, without the numbers of layer and expert; ``{layer}`` and
``{expert}`` stand in Hugging Face names.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_rmipo.families.fields import Fields


class Place(NamedTuple):
    """Where in a model a tensor stands.

    Attributes:
        layer: counted from 0; None outside the layers.
        expert: counted from 0 over all of the layer; None for what is not one expert's.
    """

    layer: int | None = None
    expert: int | None = None


class Layout(enum.Enum):
    """How a Megatron tensor is made of its sources and cut by tensor parallelism. A bias is laid out as its weight's rows are.

    What is one expert's is cut by expert tensor parallelism, all else by tensor parallelism.
    """

    WHOLE = "whole"  # one source, over the hidden channels unless its sizes are said; every rank holds all of it
    HEAD = "head"  # one source over the channels of one head; every rank holds all of it
    EXPERTS = "experts"  # one source with a row, or a number, an expert; every rank holds all of it
    GATE = "gate"  # one source of one row over the hidden channels; every rank holds all of it
    QUERIES = "queries"  # one source over the channels of the query heads; cut
    KEYS = "keys"  # one source over the channels of the key heads; cut
    HEADS = "heads"  # one source with a number a query head; cut
    VOCABULARY = "vocabulary"  # one source, rows cut, padded with zero rows
    HEAD_ROWS = "head_rows"  # one source whose rows are channels of the heads, of sizes that are said; rows cut
    HEAD_COLUMNS = "head_columns"  # one source whose columns are the channels of the heads; columns cut
    FFN_COLUMNS = "ffn_columns"  # one source whose columns are the feed-forward channels; columns cut
    # The sources of these may also be one, which holds them all, one below the other.
    QKV = "qkv"  # per key/value group: its queries, its key, its value; rows cut
    GATE_UP = "gate_up"  # gate, then up; each of the two is cut, so a rank's rows are two runs
    GATE_UP_IN_TURNS = "gate_up_in_turns"  # the same of one source, whose rows are gate, up, gate, up ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it holds.

    Attributes:
        megatron: its name, ``layers.`` without a number standing for every layer, ``mlp.experts.`` for every expert.
        sources: Hugging Face names, in the order the layout takes them.
        layout: how the sources are laid out in it.
        only_with: the trait of the architecture that says whether a model, or one of its layers, has such a tensor; None where
            all have.
        joined: Hugging Face name of one tensor that may stand for the sources in a checkpoint, which holds them one after
            another, of all experts where every one has such; it is read, and never written.
        sizes: the shape of the source where the layout does not say it, by names of the architecture's sizes, those of a part of
            it with a dot (``latent.kv_lora_rank``).
    """

    megatron: str
    sources: tuple[str, ...]
    layout: Layout
    only_with: str | None = None
    joined: str | None = None
    sizes: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return self.megatron.startswith("decoder.layers.")

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has such a tensor."""
        return ".mlp.experts." in self.megatron

    @property
    def is_stacked(self) -> bool:
        """Whether its source is one tensor of all experts, ``[experts, ...]``, whose matrices are transposed."""
        return self.per_expert and not any("{expert}" in source for source in self.sources)

    @property
    def of_shared_experts(self) -> bool:
        """Whether it belongs to the experts that every token goes through."""
        return ".mlp.shared_experts." in self.megatron

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector with an entry a row of its weight."""
        return self.megatron.endswith(".bias") or self.is_buffer

    @property
    def is_buffer(self) -> bool:
        """Whether it is no parameter, which gradients change, but a number an expert that its router is steered by."""
        return self.megatron.endswith(".expert_bias")

    @property
    def is_cut(self) -> bool:
        """Whether tensor parallelism cuts it."""
        return self.layout not in (Layout.WHOLE, Layout.HEAD, Layout.EXPERTS, Layout.GATE)

    @property
    def cuts_columns(self) -> bool:
        """Whether tensor parallelism cuts columns (otherwise rows, or nothing)."""
        return self.layout in (Layout.HEAD_COLUMNS, Layout.FFN_COLUMNS)

    def source_names(self, place: Place) -> tuple[str, ...]:
        """Hugging Face names of the sources of the tensor at ``place``."""
        return tuple(name.format(layer=place.layer, expert=place.expert) for name in self.sources)


@dataclasses.dataclass(frozen=True)
class Family:
    """What a config of this family may say, and which tensors its checkpoints hold.

    Attributes:
        name: as :class:`megatron_rmipo.families.architecture.ModelArchitecture` calls it.
        architectures: values of ``architectures`` in ``config.json`` that belong to it.
        only: fields that change the model, and the values of them that are built; absent counts as allowed, and so does a list
            of such values.
        defaults: what transformers assumes for fields a config may leave out.
        unread: fields that say nothing for this family, whatever they hold.
        switches: fields that are true or false, and which fields of the architecture each sets.
        always: fields of the architecture that are true of every model.
        read: reads what else the config says, as fields of the architecture; they stand before those that are read for all.
        rules: every tensor of the model, in the order a checkpoint is written.
        embedding: Megatron name of the word embedding.
        head: Megatron name of the output layer, absent from checkpoints of tied models.
        ignored: patterns of Hugging Face names that hold nothing learned.
    """

    name: str
    architectures: tuple[str, ...]
    only: Mapping[str, tuple[object, ...]]
    defaults: Mapping[str, object]
    rules: tuple[Rule, ...]
    embedding: str = "embedding.word_embeddings.weight"
    head: str = "output_layer.weight"
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    always: tuple[str, ...] = ()
    read: Callable[[Fields], Mapping[str, object]] | None = None

    @property
    def head_sources(self) -> tuple[str, ...]:
        """Hugging Face names of the output layer."""
        return next((rule.sources for rule in self.rules if rule.megatron == self.head), ())
