"""Whether a model can take rows, packed or padded, before it is tried. No communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_rmipo.data.batches.padding import PaddedRows, Row
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.packed_model import Chunks, chunks_of, scoring_options, unwrapped


def check_lengths(model: Chunks, rows: Sequence[Row], *, messages_of_megatron: bool = False) -> None:
    """Refuse rows of several lengths where the stages of a pipeline would take one for another.

    Args:
        model: this rank's stage of a model, or its chunks.
        rows: of one schedule.
        messages_of_megatron: the schedule runs backward passes, too, and is not run by
            :func:`megatron_rmipo.passes.rows.run_rows`, which keeps what stages send apart.

    Raises:
        ConfigError: the rows differ in length, and the pipeline cannot have that.
    """
    config = unwrapped(chunks_of(model)[0]).config
    lengths = {row.token_ids.shape[-1] for row in rows}
    if config.pipeline_model_parallel_size == 1 or len(lengths) == 1:
        return
    told = f"rows of {min(lengths)} to {max(lengths)} tokens would go through the model's pipeline"
    if not config.variable_seq_lengths:
        raise ConfigError(f"{told}, whose config has variable_seq_lengths=False. Set it to True.")
    # Of two ranks each is before and behind the other, and Megatron sends the shapes of both directions in one order.
    if messages_of_megatron and config.pipeline_model_parallel_size == 2 and config.virtual_pipeline_model_parallel_size:
        raise ConfigError(
            f"{told}, interleaved over two ranks, between which Megatron mixes up lengths that differ. Give "
            "preference_batches a pad_to, so that all rows are equally long."
        )


def check_rows(model: Chunks, rows: Sequence[Row], lengths: np.ndarray | None = None) -> None:
    """Refuse rows that somebody else's model has no embedding or no position for, or cannot share.

    Args:
        model: this rank's stage of a model, or its chunks.
        rows: of this rank.
        lengths: int ``[P, 3]``, prompt, chosen and rejected tokens of all ranks' pairs; of padded rows they are not looked at.

    Raises:
        ConfigError: the model takes no packed rows, a pair is too long, a token is none of its vocabulary, or tensor-parallel
            ranks cannot share rows of such a length.
    """
    _check_shards(unwrapped(chunks_of(model)[0]).config, rows)
    if isinstance(rows[0], PaddedRows):
        _check_ids(rows, rows[0].vocab_size)
        return
    assert lengths is not None
    options = scoring_options(chunks_of(model)[0])
    # The last token of a response is predicted, and predicts nothing.
    longest = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max()) - 1
    if options.longest is not None and longest > options.longest:
        raise ConfigError(
            f"a prompt with its response takes {longest} positions, and the model has {options.longest} (max_sequence_length). "
            "Prepare the data with a smaller --seq-length, or build the model with more."
        )
    _check_ids(rows, options.vocab_size)


def _check_shards(config: Any, rows: Sequence[Row]) -> None:
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    for length in (row.token_ids.shape[-1] for row in rows):
        if length % shards:
            raise ConfigError(
                f"sequence parallelism shares a row out to {shards} ranks, and there is one of {length} tokens. Have rows laid "
                f"out with multiple_of={shards}."
            )


def _check_ids(rows: Sequence[Row], vocab_size: int) -> None:
    ids = torch.cat([part.flatten() for row in rows for part in (row.token_ids, row.target)])
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ConfigError(
            f"token {int(ids.max())} is none of the model's vocabulary (vocab_size {vocab_size}): the data was made with another "
            "tokenizer, or too small a vocab_size given."
        )
