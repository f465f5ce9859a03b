"""What a model family is: the terms in which its file says how Hugging Face writes it and how Megatron names it.

Names of Megatron tensors are those of its distributed checkpoints, without the layer number; ``{layer}`` stands in Hugging
Face names.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping

from megatron_rmipo.families.fields import Fields


class Layout(enum.Enum):
    """How a Megatron tensor is made of its sources and cut by tensor parallelism. A bias is laid out as its weight's rows are."""

    WHOLE = "whole"  # one source, over the hidden channels unless its sizes are said; every rank holds all of it
    HEAD = "head"  # one source over the channels of one head; every rank holds all of it
    VOCABULARY = "vocabulary"  # one source, rows cut, padded with zero rows
    HEAD_ROWS = "head_rows"  # one source whose rows are channels of the heads, of sizes that are said; rows cut
    HEAD_COLUMNS = "head_columns"  # one source whose columns are the channels of the heads; columns cut
    FFN_COLUMNS = "ffn_columns"  # one source whose columns are the feed-forward channels; columns cut
    QKV = "qkv"  # per key/value group: its queries, its key, its value; rows cut
    GATE_UP = "gate_up"  # gate, then up; each of the two is cut, so a rank's rows are two runs


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it holds.

    Attributes:
        megatron: its name, ``layers.`` without a number standing for every layer.
        sources: Hugging Face names, in the order the layout takes them.
        layout: how the sources are laid out in it.
        only_with: the trait of the architecture that says whether a model, or one of its layers, has such a tensor; None where
            all have.
        sizes: the shape of the source where the layout does not say it, by names of the architecture's sizes, those of a part of
            it with a dot (``latent.kv_lora_rank``).
    """

    megatron: str
    sources: tuple[str, ...]
    layout: Layout
    only_with: str | None = None
    sizes: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return self.megatron.startswith("decoder.layers.")

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector with an entry a row of its weight."""
        return self.megatron.endswith(".bias")

    @property
    def is_cut(self) -> bool:
        """Whether tensor parallelism cuts it."""
        return self.layout not in (Layout.WHOLE, Layout.HEAD)

    @property
    def cuts_columns(self) -> bool:
        """Whether tensor parallelism cuts columns (otherwise rows, or nothing)."""
        return self.layout in (Layout.HEAD_COLUMNS, Layout.FFN_COLUMNS)

    def source_names(self, layer: int | None) -> tuple[str, ...]:
        """Hugging Face names of the sources in ``layer`` (counted from 0)."""
        return tuple(name.format(layer=layer) for name in self.sources)


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
