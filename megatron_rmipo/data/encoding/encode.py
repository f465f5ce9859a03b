"""PreferencePair -> token ids: rendering, encoding, ends of sequences, and what happens to pairs that are too long."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.official import encode_official, render_official
from megatron_rmipo.data.encoding.shorten import shorten_prompt
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, with_one_bos
from megatron_rmipo.data.encoding.written_specials import WrittenSpecials
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError

OVERLONG_POLICIES = ("left-truncate-prompt", "drop", "error", "official")
_Result = TypeVar("_Result")
_FEW_TOKENS = 4  # a response this short may be markup alone


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair; a response that the row does not have is empty.

    ``truncated`` says that the prompt (or, by the official policy, a response) was cut.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt with the longer response, or with the only one."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclasses.dataclass(frozen=True)
class LengthPolicy:
    """The limit on a prompt with its longer response, in tokens, and what to do beyond it.

    Attributes:
        seq_length: the limit.
        overlong: one of :data:`OVERLONG_POLICIES`.
        max_prompt_length: the prompt's limit; for ``official`` alone, and needed there.

    Raises:
        DataError: the combination cannot work.
    """

    seq_length: int
    overlong: str = "left-truncate-prompt"
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG_POLICIES:
            raise DataError(f"--overlong {self.overlong}: unknown; known: {', '.join(OVERLONG_POLICIES)}.")
        if self.seq_length < 3:
            raise DataError(f"--seq-length {self.seq_length}: a pair needs at least 3 tokens.")
        if self.overlong != "official":
            if self.max_prompt_length is not None:
                raise DataError(
                    f"--max-prompt-length belongs to --overlong official; {self.overlong} does not use it. Leave it out."
                )
        elif self.max_prompt_length is None:
            raise DataError("--overlong official needs --max-prompt-length (the paper: 1800 with --seq-length 2048).")
        elif not 0 < self.max_prompt_length < self.seq_length:
            raise DataError(
                f"--max-prompt-length {self.max_prompt_length}: must lie between 1 and --seq-length {self.seq_length} less 1."
            )


class PairEncoder:
    """Encodes pairs with one tokenizer, template and length policy.

    Special tokens that users wrote into a turn are encoded as ordinary text: nothing but the template can end a response. Not so
    with the ``none`` template, whose texts are rendered already, nor by the official policy.

    Raises:
        DataError: nothing would mark the end of a response.
    """

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._template, self._policy = template, policy
        self._bos, self._eos = tokenizer.info.bos_token_id, tokenizer.info.eos_token_id
        self._written = WrittenSpecials(self._backend)
        self._special_ids = frozenset(self._backend.special_ids.values())
        self._stop = self._closing_token()
        if self._stop is None and self._eos is None:
            raise DataError(
                f"{tokenizer.spec.name}: the tokenizer has no EOS token and the chat template {template.name} ends answers with "
                "no special token, so a response would have no end. Choose a template with an end-of-turn token."
            )

    def encode(self, pairs: Sequence[PreferencePair]) -> list[EncodedPair | RowFault]:
        """Encode pairs, in order; a pair that cannot be used gives its fault."""
        if self._policy.overlong == "official":
            return [_fault_or(self._encode_official, pair) for pair in pairs]
        rendered = [_fault_or(self._render, pair) for pair in pairs]
        texts = [result for result in rendered if isinstance(result, tuple)]
        prompts = iter(self._backend.first([prompt for prompt, _ in texts]))
        responses = iter(self._backend.continuation([text for _, answers in texts for text in answers]))
        results: list[EncodedPair | RowFault] = []
        for pair, result in zip(pairs, rendered, strict=True):
            if isinstance(result, tuple):
                answers = list(itertools.islice(responses, len(result[1])))
                results.append(_fault_or(self._finish, pair, next(prompts), answers))
            else:
                results.append(result)
        return results

    def _render(self, pair: PreferencePair) -> tuple[str, list[str]] | EncodedPair:
        """Prompt and response texts, to be encoded with other pairs'; a pair with written special tokens is encoded at once."""
        if not self._template.verbatim and self._written.in_pair(pair):
            return self._encode_with_stand_ins(pair)
        return self._template.render_pair(pair.prompt, tuple(pair.responses.values()), pair.variables)

    def _encode_official(self, pair: PreferencePair) -> EncodedPair:
        assert self._policy.max_prompt_length is not None
        prompt, *responses = render_official(self._template, pair)
        limits = self._policy.seq_length, self._policy.max_prompt_length
        ids, ended, truncated = encode_official(self._tokenizer, prompt, responses, *limits)
        chosen, rejected = pair.in_place(ended)
        return EncodedPair(ids, chosen or [], rejected or [], truncated)

    def _finish(self, pair: PreferencePair, prompt: list[int], responses: Sequence[list[int]]) -> EncodedPair:
        """Set BOS and ends, check, and apply the length policy. The lists are changed."""
        checked = self._checked_prompt(prompt)
        ended = [self._ended(ids, *named) for ids, named in zip(responses, pair.responses.items(), strict=True)]
        chosen, rejected = pair.in_place(ended)
        encoded = EncodedPair(checked, chosen or [], rejected or [])
        if encoded.chosen == encoded.rejected:
            raise RowFault("identical", "rejected", "both responses have the same tokens")
        if encoded.num_tokens <= self._policy.seq_length:
            return encoded
        if self._policy.overlong != "left-truncate-prompt":
            raise RowFault("too_long", "", f"{encoded.num_tokens} tokens, --seq-length is {self._policy.seq_length}")
        room = self._policy.seq_length - (encoded.num_tokens - len(encoded.prompt))
        return dataclasses.replace(encoded, prompt=self._shortened(pair, encoded.prompt, room), truncated=True)

    def _checked_prompt(self, ids: list[int]) -> list[int]:
        prompt = with_one_bos(ids, self._bos)
        if not prompt or prompt == [self._bos]:
            raise RowFault("empty_prompt", "prompt", "the prompt encodes to no tokens")
        return prompt

    def _closing_token(self) -> int | None:
        """The special token with which the template ends an answer."""
        return next((i for i in self._backend.continuation([self._template.closing])[0] if i in self._special_ids), None)

    def _ended(self, ids: list[int], field: str, response: Turn) -> list[int]:
        """The response with its end-of-turn token (the template's, else EOS) at its end, exactly once."""
        if self._template.verbatim:
            ids = self._verbatim_ended(ids, field)
        elif self._stop is None:
            assert self._eos is not None
            ids.append(self._eos)
        else:
            try:
                del ids[ids.index(self._stop) + 1 :]
            except ValueError:
                raise RowFault("template", field, f"the chat template {self._template.name} did not end this answer") from None
        if len(ids) <= _FEW_TOKENS and (len(ids) == 1 or not self._backend.plain([response.content.strip()])[0]):
            raise RowFault("empty_response", field, f"the response encodes to no tokens: {response.content[:40]!r}")
        return ids

    def _verbatim_ended(self, ids: list[int], field: str) -> list[int]:
        """A rendered response up to and with its first special token, behind which only white space may stand, else with EOS."""
        special = self._special_ids
        start = next((i for i, token in enumerate(ids) if token in special), len(ids))
        opens = start < len(ids) and ids[start] == self._bos != self._eos
        rest = [token for token in ids[start + 1 :] if token not in special]
        if opens or self._tokenizer.decode(rest).strip():
            raise RowFault("special_token", field, "a special token stands inside the response, with text behind it")
        assert self._eos is not None
        return ids[: start + 1] if start < len(ids) else [*ids, self._eos]

    def _shortened(self, pair: PreferencePair, prompt: list[int], room: int) -> list[int]:
        """The prompt in at most ``room`` tokens: by turns and text where there is a template, else by tokens, BOS staying."""
        if self._template.verbatim:
            num_bos = int(self._bos is not None)
            shorter = prompt[:num_bos] + prompt[num_bos - room :] if room > num_bos else None
        else:
            shorter = shorten_prompt(pair.prompt, room, lambda turns: self._encode_prompt(turns, pair.variables))
        if shorter is None:
            raise RowFault(
                "response_too_long",
                "",
                f"the longer response has {self._policy.seq_length - room} tokens, --seq-length {self._policy.seq_length} leaves "
                f"{max(room, 0)} for the prompt, too few for its beginning and end",
            )
        return shorter

    def _encode_prompt(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> list[int]:
        if not self._written.in_turns(turns):
            ids = self._backend.first([self._template.render(turns, variables, add_generation_prompt=True)])[0]
        else:
            base = self._written.free_base(turn.content for turn in turns)
            text = self._template.render(self._written.hide_turns(turns, base), variables, add_generation_prompt=True)
            ids = self._written.encode(text, base, first=True)
        return with_one_bos(ids, self._bos)

    def _encode_with_stand_ins(self, pair: PreferencePair) -> EncodedPair:
        """Encode a pair in which users wrote special tokens; an end that stands behind a response already is dropped."""
        ends = {token for token in (self._eos, self._stop) if token is not None}
        answers = [turn._replace(content=self._written.without_trailing(turn.content, ends)) for turn in pair.responses.values()]
        base = self._written.free_base(turn.content for turn in (*pair.prompt, *answers))
        hidden = self._written.hide_turns(pair.prompt, base)
        prompt, responses = self._template.render_pair(hidden, self._written.hide_turns(answers, base), pair.variables)
        ids = [self._written.encode(text, base, first=False) for text in responses]
        chosen, rejected = pair.in_place(answers)
        pair = pair._replace(chosen=chosen, rejected=rejected)
        return self._finish(pair, self._written.encode(prompt, base, first=True), ids)


def _fault_or(function: Callable[..., _Result], *arguments: Any) -> _Result | RowFault:
    try:
        return function(*arguments)
    except RowFault as fault:
        return fault
