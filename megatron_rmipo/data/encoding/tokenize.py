"""Tokenizers: Hugging Face or bare sentencepiece, with prompt and response encoded apart.

The ids of a pair come from three texts, prompt, chosen and rejected, each encoded on its own (the responses as continuations, see
:mod:`megatron_rmipo.data.encoding.backends`). So the prompt's ids are the same for both responses and the boundary is exact by
design. Where the vocabulary merges nothing across the boundary, this equals encoding prompt and response together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.data.encoding.backends import Backend, HfBackend, SentencePieceBackend
from megatron_rmipo.data.store.pair_store import TokenizerInfo
from megatron_rmipo.errors import DataError

BOS_POLICIES = ("template", "always", "never")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_fingerprint(vocabulary: Mapping[str, int], bos_token_id: int | None, eos_token_id: int | None) -> str:
    """sha256 over the vocabulary by id and the BOS and EOS ids.

    Equal for the slow, fast and sentencepiece forms of one vocabulary.

    Args:
        vocabulary: token -> id, added tokens included.
        bos_token_id: None where there is none.
        eos_token_id: None where there is none.
    """
    digest = hashlib.sha256(f"bos={bos_token_id} eos={eos_token_id}\n".encode())
    for index, token in sorted((index, token) for token, index in vocabulary.items()):
        digest.update(f"{index} {json.dumps(token)}\n".encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Everything a worker process needs to build the tokenizer, without transformers.

    Attributes:
        name: the path or name it was loaded from.
        model: the text of a ``tokenizer.json``, or the bytes of a sentencepiece model.
        special_tokens: ``bos_token``, ``eos_token`` and the like -> token, as chat templates see them.
        bos_token_id, eos_token_id: None where there is none.
        chat_template: the tokenizer's own Jinja template.
        tool_template: another one of its own, for conversations with tools; None where it has none.
        end_token_ids: with which the model may end its turn, by its generation config.
        control_tokens: added tokens, special or not, that its config says no user may write.
    """

    name: str
    model: str | bytes
    special_tokens: dict[str, str]
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    tool_template: str | None = None
    end_token_ids: tuple[int, ...] = ()
    control_tokens: tuple[str, ...] = ()


class PreferenceTokenizer:
    """A tokenizer that encodes prompts and responses apart.

    Attributes:
        spec: what it was built from; can be sent to another process.
        backend: the three ways to encode.
        info: fingerprint, size and special ids.
        chat_template: the tokenizer's own Jinja template, None where it has none.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self.backend: Backend = SentencePieceBackend(spec.model) if isinstance(spec.model, bytes) else HfBackend(spec.model)
        self.chat_template = spec.chat_template
        vocabulary = self.backend.vocabulary()
        self.info = TokenizerInfo(
            fingerprint=tokenizer_fingerprint(vocabulary, spec.bos_token_id, spec.eos_token_id),
            vocab_size=max(vocabulary.values()) + 1,
            bos_token_id=spec.bos_token_id,
            eos_token_id=spec.eos_token_id,
        )

    def __reduce__(self) -> tuple[type[PreferenceTokenizer], tuple[TokenizerSpec]]:
        return PreferenceTokenizer, (self.spec,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the start of a sequence, without BOS and EOS added."""
        return self.backend.first([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown."""
        return self.backend.decode(ids)

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add behind ``prompt_ids``: unlike :meth:`decode` it keeps a leading space."""
        before = self.backend.decode(prompt_ids)
        whole = self.backend.decode([*prompt_ids, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.backend.decode(ids)

    def encode_rendered(self, prompt_text: str, response_text: str) -> tuple[list[int], list[int]]:
        """Ids of a rendered prompt and of its response; special tokens in the texts are recognised.

        BOS stands at the head of the prompt exactly once (where the tokenizer has one), EOS exactly once at the response's end.

        Returns:
            Prompt ids and response ids.

        Raises:
            DataError: the response holds EOS before its end.
        """
        prompt = with_one_bos(self.backend.first([prompt_text])[0], self.info.bos_token_id)
        response = self.backend.continuation([response_text])[0]
        eos = self.info.eos_token_id
        if eos is None:
            return prompt, response
        while response and response[-1] == eos:
            response.pop()
        if eos in response:
            raise DataError(f"the response holds the end-of-sequence token {eos} before its end: {response_text[:200]!r}")
        return prompt, [*response, eos]


def with_one_bos(prompt_ids: Sequence[int], bos_token_id: int | None) -> list[int]:
    """The prompt with BOS at its head exactly once, whether the template wrote it never, once or twice."""
    if bos_token_id is None:
        return list(prompt_ids)
    start = 0
    while start < len(prompt_ids) and prompt_ids[start] == bos_token_id:
        start += 1
    return list(prompt_ids) if start == 1 else [bos_token_id, *prompt_ids[start:]]


def without_bos(prompt_ids: Sequence[int], bos_token_id: int | None) -> list[int]:
    """The prompt without any BOS at its head."""
    return list(itertools.dropwhile(lambda token: token == bos_token_id, prompt_ids))


def load_tokenizer(path_or_name: str) -> PreferenceTokenizer:
    """Load a Hugging Face tokenizer (a directory or a hub name) or a bare sentencepiece ``.model`` file.

    Raises:
        DataError: it cannot be found or read, or has no fast form.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file() and path.name in _TOKENIZER_FILES:
        path = path.parent
    if path.is_file():
        return _load_sentencepiece(path, path_or_name)
    if path.is_dir():
        if any((path / name).is_file() for name in _TOKENIZER_FILES):
            return _load_hf(str(path), path_or_name)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return _load_sentencepiece(models[0], path_or_name)
        raise DataError(
            f"{path}: holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES)} and one sentencepiece *.model file)."
        )
    if path.is_absolute() or path_or_name.startswith((".", "~")) or path_or_name.count("/") > 1 or path.suffix == ".model":
        raise DataError(f"{path_or_name}: no such tokenizer file or directory.")
    return _load_hf(path_or_name, path_or_name)


def _load_sentencepiece(path: Path, name: str) -> PreferenceTokenizer:
    from sentencepiece import SentencePieceProcessor

    model = path.read_bytes()
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{path}: not a sentencepiece model ({error}).\nGive a sentencepiece .model file, or a directory with tokenizer.json."
        ) from None
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    special_tokens = {token: processor.id_to_piece(index) for token, index in ids.items() if index >= 0}
    return PreferenceTokenizer(
        TokenizerSpec(
            name=name,
            model=model,
            special_tokens=special_tokens,
            bos_token_id=ids["bos_token"] if ids["bos_token"] >= 0 else None,
            eos_token_id=ids["eos_token"] if ids["eos_token"] >= 0 else None,
            chat_template=None,
        )
    )


def _load_hf(source: str, name: str) -> PreferenceTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise DataError(
            f"{name}: no tokenizer could be loaded from it: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{name}: {type(tokenizer).__name__} has no fast form (tokenizer.json).\n"
            "Give its sentencepiece .model file instead, or save it once with a fast tokenizer."
        )
    default, for_tools = _own_templates(tokenizer.chat_template, name)
    return PreferenceTokenizer(
        TokenizerSpec(
            name=name,
            model=tokenizer.backend_tokenizer.to_str(),
            special_tokens={key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            chat_template=default,
            tool_template=for_tools,
            end_token_ids=_end_token_ids(source),
            control_tokens=tuple(getattr(tokenizer, "chat_control_tokens", None) or ()),
        )
    )


def _own_templates(template: str | dict[str, str] | None, name: str) -> tuple[str | None, str | None]:
    """(the tokenizer's template, that for conversations with tools where it is another)."""
    if not isinstance(template, dict):
        return template, None
    if "default" not in template:
        raise DataError(
            f"{name}: has the chat templates {', '.join(sorted(template))} and none named default. Pass --chat-template FILE."
        )
    return template["default"], template.get("tool_use")


def _end_token_ids(source: str) -> tuple[int, ...]:
    """``eos_token_id`` of the model's ``generation_config.json``; empty where there is none.

    Raises:
        DataError: the file cannot be read, or says something else than token ids.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # a hub name whose other files are at hand, and this one out of reach
        path = None
    if path is None:
        return ()
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable generation config ({error}).") from None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(index, int) for index in ids):
        raise DataError(f"{path}: eos_token_id is {ids}, not one token id or a list of them.")
    return tuple(ids)
