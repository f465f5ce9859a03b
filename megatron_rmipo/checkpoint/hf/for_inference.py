"""What programs that generate need beside weights: a chat template, a pad token, and the tokens that end an answer.

Only what is missing is added: a directory that has all of it keeps its files as they are, byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.peft.reading import CARD_NAME
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.errors import ConversionError

_TEMPLATE_FILE = "chat_template.jinja"
_OTHER_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Names of tokens that no text holds, in the order in which they are taken.
_FREE_TOKENS = (re.compile("pad", re.IGNORECASE), re.compile("reserved", re.IGNORECASE))


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a model gets beside its weights, besides the files of the model that it was made from.

    Attributes:
        chat: how its conversations are written; None leaves the tokenizer's own template.
        card: the text of its model card; None writes none.
    """

    chat: ChatForm | None = None
    card: str | None = None

    def write(self, directory: Path) -> None:
        """Put it into a directory that has config and tokenizer.

        Raises:
            ConversionError: a file of the tokenizer cannot be read.
        """
        if self.chat is not None:
            _write_templates(directory, self.chat)
        if any((directory / name).is_file() for name in _TOKENIZER_FILES):
            _complete(directory, None if self.chat is None else self.chat.end_token_id)
        if self.card is not None:
            (directory / CARD_NAME).write_text(self.card, encoding="utf-8")


NOTHING_ELSE = Beside()


def _write_templates(directory: Path, chat: ChatForm) -> None:
    wanted = {"default": chat.template} | ({} if chat.tool_template is None else {"tool_use": chat.tool_template})
    own = own_templates(directory)
    if {name: own.get(name) for name in ("default", "tool_use")} == {"tool_use": None, **wanted}:
        return
    (directory / _TEMPLATE_FILE).write_text(chat.template, encoding="utf-8")
    other = directory / _OTHER_TEMPLATES / "tool_use.jinja"
    other.unlink(missing_ok=True)
    if chat.tool_template is not None:
        other.parent.mkdir(exist_ok=True)
        other.write_text(chat.tool_template, encoding="utf-8")
    # Programs that look there first must not find another one.
    config_path = directory / "tokenizer_config.json"
    config = _read(config_path)
    if config.pop("chat_template", None) is not None:
        _write(config_path, config)


def own_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a tokenizer by name, ``default`` among them, as transformers finds them.

    Raises:
        ConversionError: a file cannot be read.
    """
    in_config = _read(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(in_config, list):
        found = {str(one["name"]): str(one["template"]) for one in in_config}
    else:
        found = {} if in_config is None else {"default": str(in_config)}
    others = sorted((directory / _OTHER_TEMPLATES).glob("*.jinja"))
    if (directory / _TEMPLATE_FILE).is_file():
        found = {"default": (directory / _TEMPLATE_FILE).read_text(encoding="utf-8")}
    return found | {path.stem: path.read_text(encoding="utf-8") for path in others}


def _complete(directory: Path, end_token_id: int | None) -> None:
    """Add a pad token to a tokenizer that has none, and to the generation config what it lacks."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConversionError(f"{directory}: its tokenizer cannot be read: {error}") from error
    pad = tokenizer.pad_token
    if pad is None:
        pad = _token_to_pad_with(tokenizer)
        if pad is not None:
            path = directory / "tokenizer_config.json"
            _write(path, {**_read(path), "pad_token": pad})
    path = directory / "generation_config.json"
    config = _read(path)
    known = config.get("eos_token_id", _read(directory / "config.json").get("eos_token_id"))
    ends = [] if known is None else known if isinstance(known, list) else [known]
    added = [end for end in (tokenizer.eos_token_id, end_token_id) if end not in (None, *ends)]
    wanted = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [*ends, *dict.fromkeys(added)] if ends or added else None,
        "pad_token_id": None if pad is None else tokenizer.convert_tokens_to_ids(pad),
    }
    missing = {name: value for name, value in wanted.items() if value is not None and config.get(name) is None}
    if added:
        missing["eos_token_id"] = wanted["eos_token_id"]
    if missing:
        _write(path, {**config, **missing})


def _token_to_pad_with(tokenizer: Any) -> str | None:
    """A token of the vocabulary named so, else a reserved one, else the unknown one, else EOS."""
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    ends = (tokenizer.eos_token, tokenizer.bos_token)
    for pattern in _FREE_TOKENS:
        for token in added:
            if pattern.search(token) and token not in ends:
                return token
    fallback: str | None = tokenizer.eos_token if tokenizer.unk_token is None else tokenizer.unk_token
    return fallback


def _read(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, none where it is not there."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path}: not readable JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path}: holds no fields, but {type(fields).__name__}.")
    return fields


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
