"""The two kinds of tokenizer behind one face: Hugging Face ``tokenizers`` and bare sentencepiece models.

A backend encodes a text in three ways:

- ``first``: as the start of a sequence, special tokens in the text recognised;
- ``continuation``: as what follows other text: the same, but without the space that many tokenizers put before a sequence;
- ``plain``: a continuation whose special and other added tokens are ordinary text, for what users wrote.

Encoding prompt and response apart, the response as a continuation, makes the boundary between them exact whatever the vocabulary
would merge across it. Backends import neither torch nor transformers: each worker process builds one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

# Appended to a serialized sentencepiece model, this sets normalizer_spec.add_dummy_prefix (field 3 of field 3) to false: protobuf
# merges a repeated submessage into the first, later scalars winning.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Backend(Protocol):
    """What :class:`megatron_rmipo.data.encoding.tokenize.PreferenceTokenizer` needs of a tokenizer."""

    special_ids: dict[str, int]
    added_ids: dict[str, int]  # those and what else of the vocabulary is found in a text before it is cut into pieces

    def first(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as starts of sequences. BOS and EOS are not added."""

    def continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as what follows other text."""

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as what follows other text, added tokens in them being ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown."""

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""


class HfBackend:
    """A ``tokenizers`` tokenizer, from the text of its ``tokenizer.json``."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        spec = json.loads(tokenizer_json)
        spec["truncation"] = spec["padding"] = None
        without_prefix = _without_prefix_space(spec)
        self._first = Tokenizer.from_str(json.dumps(spec))
        # One and the same where it can be: each keeps its own cache of words.
        self._continuation = self._first if without_prefix == spec else Tokenizer.from_str(json.dumps(without_prefix))
        self._plain = Tokenizer.from_str(json.dumps({**without_prefix, "added_tokens": []}))
        added = self._first.get_added_tokens_decoder()
        self.added_ids = {token.content: index for index, token in added.items()}
        self.special_ids = {token.content: index for index, token in added.items() if token.special}

    def first(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return _encode(self._first, texts)

    def continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return _encode(self._continuation, texts)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return _encode(self._plain, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Backend`."""
        return str(self._first.decode(list(ids), skip_special_tokens=False))

    def vocabulary(self) -> dict[str, int]:
        """See :class:`Backend`."""
        return dict(self._first.get_vocab(with_added_tokens=True))


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_prefix_space(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without the space it puts before a text, in any of the three places a tokenizer.json may ask for it."""
    return {
        **spec,
        "normalizer": _map_components(spec.get("normalizer"), "normalizers"),
        "pre_tokenizer": _map_components(spec.get("pre_tokenizer"), "pretokenizers"),
    }


def _map_components(component: dict[str, Any] | None, members: str) -> dict[str, Any] | None:
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        kept = [_map_components(member, members) for member in component[members]]
        return {**component, members: [member for member in kept if member is not None]}
    changed = dict(component)
    if component["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    elif component["type"] == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


class SentencePieceBackend:
    """A bare sentencepiece model, from its serialized bytes.

    Control pieces (``<s>``, ``</s>``) in a rendered text become their ids. As in Mistral's and Llama's own code, text behind a
    control piece starts a sequence anew: the model's dummy space is put before it.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._with_prefix = SentencePieceProcessor(model_proto=model)
        self._without_prefix = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        processor = self._with_prefix
        self._pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
        self.special_ids = {piece: index for index, piece in enumerate(self._pieces) if processor.is_control(index)}
        self.added_ids = self.special_ids
        self._special = re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")") if self.special_ids else None
        # A model that removes extra spaces would also drop the one between prompt and response; its dummy prefix puts that back.
        self._drops_leading_space = not self._without_prefix.normalize(" a").startswith("\u2581")

    def first(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return self._encode(texts, continued=False)

    def continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return self._encode(texts, continued=True)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Backend`."""
        return self._encode_pieces([(text, True) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Backend`."""
        parts: list[str] = []
        run: list[int] = []
        for index in [*ids, None]:
            if index is not None and self._pieces[index] not in self.special_ids:
                run.append(int(index))
                continue
            if run:
                parts.append(self._with_prefix.decode(run))
                run = []
            if index is not None:
                parts.append(self._pieces[index])
        return "".join(parts)

    def vocabulary(self) -> dict[str, int]:
        """See :class:`Backend`."""
        return {piece: index for index, piece in enumerate(self._pieces)}

    def _encode(self, texts: Sequence[str], *, continued: bool) -> list[list[int]]:
        segments: list[tuple[str, bool]] = []
        layouts: list[list[int | None]] = []  # per text: ids of control pieces, and None for the next segment
        for text in texts:
            layout: list[int | None] = []
            for position, part in enumerate(self._special.split(text) if self._special else [text]):
                if position % 2:
                    layout.append(self.special_ids[part])
                elif part:
                    layout.append(None)
                    segments.append((part, continued and position == 0))
            layouts.append(layout)
        encoded = iter(self._encode_pieces(segments))
        return [[i for item in layout for i in (next(encoded) if item is None else [item])] for layout in layouts]

    def _encode_pieces(self, segments: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Encode texts without control pieces; the flag asks for a continuation."""
        bare = [continued and not self._loses_leading_space(text) for text, continued in segments]
        without_prefix = iter(self._batch(self._without_prefix, [text for (text, _), b in zip(segments, bare, strict=True) if b]))
        with_prefix = iter(self._batch(self._with_prefix, [text for (text, _), b in zip(segments, bare, strict=True) if not b]))
        return [next(without_prefix) if b else next(with_prefix) for b in bare]

    def _loses_leading_space(self, text: str) -> bool:
        first = text[:1]
        return self._drops_leading_space and first.isspace() and self._without_prefix.normalize(f"a{first}a") == "a\u2581a"

    @staticmethod
    def _batch(processor: Any, texts: list[str]) -> list[list[int]]:
        return list(processor.encode(texts, num_threads=1)) if texts else []
