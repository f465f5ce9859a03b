"""With which token a response ends, and where."""

from __future__ import annotations

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.encoding.written_specials import is_markup
from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.errors import DataError


class EndOfTurn:
    """The end of an answer: the first control token that the template writes behind one, else the model's EOS.

    Control tokens are special tokens, those of the generation config's ``eos_token_id``, the tokenizer's EOS, and added tokens
    that look like no word, whether they are marked special or not.

    Attributes:
        token: the end of an answer in plain text.
        tokens: every token that ends a turn of this model: an answer with a call may have another end than others.

    Raises:
        DataError: there is none.
    """

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate) -> None:
        backend, spec, eos = tokenizer.backend, tokenizer.spec, tokenizer.info.eos_token_id
        of_model = {*spec.end_token_ids, *([] if eos is None else [eos])}
        control = {*backend.special_ids.values(), *of_model}
        control |= {index for token, index in backend.added_ids.items() if is_markup(token)}
        closing = backend.continuation([template.closing])[0]
        self._template_title, self._decode = template.title, backend.decode
        self._of_template = next((token for token in closing if token in control), None)
        # A tokenizer may name another EOS than the model's own list, which generation goes by.
        of_config = next(iter(spec.end_token_ids), None) if eos not in spec.end_token_ids else eos
        end = next((token for token in (self._of_template, of_config, eos) if token is not None), None)
        if end is None:
            raise DataError(
                f"{spec.name}: the tokenizer has no EOS token and {template.title} ends answers with "
                "no special token, so a response would have no end. Choose a template with an end-of-turn token."
            )
        self.token: int = end
        # A generation config may name an ordinary token, such as a line break: it ends nothing that is only text.
        self.tokens = {token for token in (end, *of_model) if token in backend.added_ids.values()}
        self._usual = end if end in self.tokens else -1
        self._behind = closing[closing.index(end) + 1 :] if end in closing else []

    def close(self, ids: list[int], field: str) -> list[int]:
        """A response up to and with its end; the list is changed.

        Raises:
            RowFault: the template wrote no end, or text behind it.
        """
        try:
            end = ids.index(self._usual)
        except ValueError:
            end = min([ids.index(token) for token in self.tokens if token in ids], default=-1)
        if end < 0:
            if self._of_template is not None:
                raise RowFault("template", field, f"{self._template_title} did not end this answer") from None
            ids.append(self.token)
            return ids
        behind = ids[end + 1 :]
        if behind and behind != self._behind and self._decode([t for t in behind if t not in self.tokens]).strip():
            raise RowFault("template", field, f"{self._template_title} writes text behind the end of this answer")
        del ids[end + 1 :]
        return ids
