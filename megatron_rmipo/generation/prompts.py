"""Conversations to prompt ids and answers back to text, as the model was trained: through its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.ends import EndOfTurn
from megatron_rmipo.data.encoding.tokenize import load_tokenizer, with_one_bos
from megatron_rmipo.data.reading.rows import RowFault, Turn
from megatron_rmipo.errors import ConfigError, DataError


class Prompts:
    """The prompts of one model.

    Args:
        model: a Hugging Face model directory.
        chat_template: a built-in template or a file; None for the tokenizer's own.

    Attributes:
        end_ids: the tokens that end an answer.
        template_digest: of the chat template.
        longest: tokens of a conversation that the model takes; None where its config names no limit.

    Raises:
        ConfigError: there is no model.
        DataError: it has no tokenizer, or no chat template.
    """

    def __init__(self, model: Path, chat_template: str | None) -> None:
        self.longest = longest_sequence(model)
        self._tokenizer = load_tokenizer(str(model))
        self._template = load_template(chat_template, self._tokenizer)
        self.end_ids = frozenset(EndOfTurn(self._tokenizer, self._template).tokens)
        self.template_digest = self._template.digest
        self._special_ids = frozenset(self._tokenizer.backend.special_ids.values()) | self.end_ids

    def encode(self, turns: Sequence[Turn], where: str) -> list[int]:
        """Ids of a conversation that the model is to go on with.

        Args:
            turns: its messages, the last the user's.
            where: names it in messages.

        Raises:
            DataError: the template refuses it.
        """
        template = self._template
        try:
            text = template.render(turns, add_generation_prompt=True) + template.plain_boundary.added
        except RowFault as fault:
            raise DataError(f"{where}: {fault.message}.") from None
        ids = self._tokenizer.encode(text)
        # The built-in templates leave BOS to the encoding.
        return with_one_bos(ids, self._tokenizer.info.bos_token_id) if template.answer is not None else ids

    def decode(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens and white space around it."""
        return self._tokenizer.decode_continuation(prompt_ids, [token for token in ids if token not in self._special_ids]).strip()


def longest_sequence(model: Path) -> int | None:
    """Tokens that a model takes, by its config; None where that names no limit.

    Raises:
        ConfigError: there is no config to read.
    """
    path = model / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--model {model}: config.json cannot be read ({reason}). Name the directory of a Hugging Face model, such as "
            "--save-hf of the trainer writes it; nothing is downloaded here."
        ) from None
    limit = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return limit if isinstance(limit, int) else None
