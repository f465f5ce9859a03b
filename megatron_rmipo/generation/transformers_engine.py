"""Answers by transformers, in batches padded on the left, on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from megatron_rmipo.errors import ConfigError, OutOfMemoryError
from megatron_rmipo.generation.requests import Completion, Request

_BATCH_SIZE = 8
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class RowSampler(LogitsProcessor):
    """Turns logits into scores whose greatest is a sample, each row with a generator of its own.

    Adding Gumbel noise to logits and taking the greatest samples from their softmax. With the noise of a row drawn from its own
    seed, on the CPU, an answer does not depend on the rows beside it nor on the device.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, V]`` of the next tokens from logits ``[B, V]``."""
        rows = []
        for request, generator, logits in zip(self._requests, self._generators, scores.float(), strict=True):
            if request.temperature > 0:
                noise = torch.empty(logits.shape).exponential_(generator=generator).log_()
                logits = _nucleus(logits / request.temperature, request.top_p) - noise.to(logits.device)
            rows.append(logits)
        return torch.stack(rows)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits ``[V]`` with all but the most probable tokens, of ``top_p`` in sum, at minus infinity."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, places, before >= top_p), -torch.inf)


class TransformersEngine:
    """See :class:`megatron_rmipo.generation.requests.Engine`.

    Args:
        model: a Hugging Face model directory.
        end_ids: the tokens that end an answer.
        dtype: ``bf16`` or ``fp32``.
        batch_size: requests at once; None for 8.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    name = "transformers"

    def __init__(self, model: Path, end_ids: Collection[int], *, dtype: str, batch_size: int | None) -> None:
        self.batch_size = batch_size or _BATCH_SIZE
        self._end_ids = sorted(end_ids)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A line a tensor, in a log file.
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=_DTYPES[dtype], local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"--model {model}: cannot be loaded by transformers: {str(error).splitlines()[0]}") from error
        self._model = loaded.to(self._device).eval()
        # The model's own settings of sampling must not slip in beside those that were asked for.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See :class:`megatron_rmipo.generation.requests.Engine`.

        Raises:
            OutOfMemoryError: the GPU has no memory left.
        """
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), longest), self._end_ids[0])
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, longest - len(request.prompt_ids) :] = 1
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            eos_token_id=self._end_ids,
            pad_token_id=self._end_ids[0],
        )
        try:
            with torch.inference_mode():
                written = self._model.generate(
                    ids.to(self._device),
                    attention_mask=mask.to(self._device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([RowSampler(requests)]),
                )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory for {len(requests)} answers at once, to prompts of up to {longest} tokens. Lower --batch-size "
                f"(it is {self.batch_size}) or --max-tokens; the answers so far are kept."
            ) from error
        return [
            Completion.cut(row, self._end_ids, request.max_tokens)
            for row, request in zip(written[:, longest:].tolist(), requests, strict=True)
        ]
