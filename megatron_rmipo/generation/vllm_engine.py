"""Answers by vLLM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from vllm import LLM, SamplingParams

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.generation.requests import Completion, Request

# It schedules by itself; so many are kept together, and lost together by a kill.
_BATCH_SIZE = 256
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine:
    """See :class:`megatron_rmipo.generation.requests.Engine`.

    Args:
        model: a Hugging Face model directory.
        end_ids: the tokens that end an answer.
        dtype: ``bf16`` or ``fp32``.
        batch_size: requests at once; None for 256.
        num_gpus: over how many the model is shared.

    Raises:
        ConfigError: vLLM cannot load the model.
    """

    name = "vllm"

    def __init__(self, model: Path, end_ids: Collection[int], *, dtype: str, batch_size: int | None, num_gpus: int) -> None:
        self.batch_size = batch_size or _BATCH_SIZE
        self._end_ids = sorted(end_ids)
        try:
            self._llm = LLM(model=str(model), dtype=_DTYPES[dtype], tensor_parallel_size=num_gpus, generation_config="vllm")
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--model {model}: cannot be loaded by vLLM: {error}") from error

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See :class:`megatron_rmipo.generation.requests.Engine`."""
        settings = [
            SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop_token_ids=self._end_ids,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self._llm.generate(prompts, settings, use_tqdm=False)
        return [
            Completion.cut(output.outputs[0].token_ids, self._end_ids, request.max_tokens)
            for output, request in zip(outputs, requests, strict=True)
        ]
