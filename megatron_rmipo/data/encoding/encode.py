"""PreferencePair -> token ids: rendering, encoding, ends of sequences, and what happens to pairs that are too long."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.ends import EndOfTurn
from megatron_rmipo.data.encoding.official import encode_official, render_official
from megatron_rmipo.data.encoding.shorten import shorten_prompt
from megatron_rmipo.data.encoding.shown import ShownCheck
from megatron_rmipo.data.encoding.tokenize import BOS_POLICIES, PreferenceTokenizer, with_one_bos, without_bos
from megatron_rmipo.data.encoding.written_specials import StandIns, WrittenSpecials
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError

OVERLONG_POLICIES = ("left-truncate-prompt", "drop", "error", "official")
_Result = TypeVar("_Result")
_FEW_TOKENS = 4  # a response this short may be markup alone


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair; a response that the row does not have is empty.

    Attributes:
        prompt, chosen, rejected: the ids.
        truncated: the prompt (or, by the official policy, a response) was cut.
        left_out: the template left out reasoning of earlier turns, or wrote an assistant's text otherwise than it is, as those do
            that drop what stands before ``</think>``.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False
    left_out: bool = False

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

    Control tokens that users wrote into a row are encoded as ordinary text: nothing but the template can end a response. Not so
    with the ``none`` template, whose texts are rendered already, nor by the official policy.

    Raises:
        DataError: nothing would mark the end of a response.
    """

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._template, self._policy = template, policy
        self._bos = tokenizer.info.bos_token_id
        self._special_ids = frozenset(self._backend.special_ids.values())
        self._end = EndOfTurn(tokenizer, template)
        ends = [token for token, index in self._backend.added_ids.items() if index in self._end.tokens]
        self._written = WrittenSpecials(self._backend, template, (*tokenizer.spec.control_tokens, *ends))
        self._shown = ShownCheck(template)
        if policy.overlong == "official" and template.bos != BOS_POLICIES[0]:
            raise DataError(f"--bos {template.bos}: --overlong official puts BOS as the authors do. Leave one of the two out.")

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
                results.append(_fault_or(self._finish, pair, result, next(prompts), answers))
            else:
                results.append(result)
        return results

    def _render(self, pair: PreferencePair) -> tuple[str, list[str]] | EncodedPair:
        """Prompt and response texts, to be encoded with other pairs'; a pair with written control tokens is encoded at once."""
        if not self._template.verbatim and self._written.in_pair(pair):
            return self._encode_with_stand_ins(pair)
        return self._template.render_row(pair)

    def _encode_official(self, pair: PreferencePair) -> EncodedPair:
        assert self._policy.max_prompt_length is not None
        left_out = self._shown.check(pair)
        prompt, *responses = render_official(self._template, pair)
        limits = self._policy.seq_length, self._policy.max_prompt_length
        ids, ended, truncated = encode_official(self._tokenizer, prompt, responses, *limits)
        chosen, rejected = pair.in_place(ended)
        return EncodedPair(ids, chosen or [], rejected or [], truncated, left_out)

    def _finish(
        self,
        pair: PreferencePair,
        texts: tuple[str, list[str]],
        prompt: list[int],
        responses: Sequence[list[int]],
        hidden: StandIns | None = None,
    ) -> EncodedPair:
        """Set BOS and ends, check, and apply the length policy. The lists are changed."""
        left_out = self._shown.check(pair) or not _holds_all(pair, *texts, hidden)
        checked = self._checked_prompt(prompt)
        named = pair.responses.items()
        ended = [self._ended(ids, *name) for ids, name in zip(responses, named, strict=True)]
        chosen, rejected = pair.in_place(ended)
        encoded = EncodedPair(checked, chosen or [], rejected or [], left_out=left_out)
        if encoded.chosen == encoded.rejected:
            raise RowFault("identical", "rejected", "both responses have the same tokens")
        if encoded.num_tokens <= self._policy.seq_length:
            return encoded
        if self._policy.overlong != "left-truncate-prompt":
            raise RowFault("too_long", "", f"{encoded.num_tokens} tokens, --seq-length is {self._policy.seq_length}")
        room = self._policy.seq_length - (encoded.num_tokens - len(encoded.prompt))
        return dataclasses.replace(encoded, prompt=self._shortened(pair, encoded.prompt, room, hidden), truncated=True)

    def _checked_prompt(self, ids: list[int]) -> list[int]:
        prompt = self._with_bos(ids)
        if not prompt or prompt == [self._bos]:
            raise RowFault("empty_prompt", "prompt", "the prompt encodes to no tokens")
        return prompt

    def _with_bos(self, ids: list[int]) -> list[int]:
        """The prompt as ``--bos`` has it; the built-in templates leave BOS to us."""
        if self._template.bos == "never":
            return without_bos(ids, self._bos)
        as_rendered = self._template.bos == "template" and self._template.answer is None
        return ids if as_rendered else with_one_bos(ids, self._bos)

    def _ended(self, ids: list[int], field: str, response: Turn) -> list[int]:
        """The response with its end of turn at its end, exactly once."""
        ids = self._verbatim_ended(ids, field) if self._template.verbatim else self._end.close(ids, field)
        bare = len(ids) <= _FEW_TOKENS and not response.fields
        if bare and (len(ids) == 1 or not self._backend.plain([response.content.strip()])[0]):
            raise RowFault("empty_response", field, f"the response encodes to no tokens: {response.content[:40]!r}")
        return ids

    def _verbatim_ended(self, ids: list[int], field: str) -> list[int]:
        """A rendered response up to and with its first special token, behind which only white space may stand, else with EOS."""
        special = self._special_ids
        start = next((i for i, token in enumerate(ids) if token in special), len(ids))
        opens = start < len(ids) and ids[start] == self._bos != self._tokenizer.info.eos_token_id
        rest = [token for token in ids[start + 1 :] if token not in special]
        if opens or self._tokenizer.decode(rest).strip():
            raise RowFault("special_token", field, "a special token stands inside the response, with text behind it")
        return ids[: start + 1] if start < len(ids) else [*ids, self._end.token]

    def _shortened(self, pair: PreferencePair, prompt: list[int], room: int, hidden: StandIns | None) -> list[int]:
        """The prompt in at most ``room`` tokens: by turns and text where there is a template, else by tokens, BOS staying."""
        if self._template.verbatim:
            num_bos = int(prompt[0] == self._bos)
            shorter = prompt[:num_bos] + prompt[num_bos - room :] if room > num_bos else None
        else:
            shorter = shorten_prompt(pair.prompt, room, lambda turns: self._encode_prompt(pair, turns, hidden))
        if shorter is None:
            raise RowFault(
                "response_too_long",
                "",
                f"the longer response has {self._policy.seq_length - room} tokens, --seq-length {self._policy.seq_length} leaves "
                f"{max(room, 0)} for the prompt, too few for its beginning and end",
            )
        return shorter

    def _encode_prompt(self, pair: PreferencePair, turns: Sequence[Turn], hidden: StandIns | None) -> list[int]:
        pair = pair._replace(prompt=tuple(turns))
        pair = hidden.hide_pair(pair) if hidden is not None else pair
        text = self._template.render_prompt(pair.prompt, tuple(pair.responses.values()), pair.variables)
        return self._with_bos(hidden.encode(text, first=True) if hidden is not None else self._backend.first([text])[0])

    def _encode_with_stand_ins(self, pair: PreferencePair) -> EncodedPair:
        """Encode a pair in which users wrote control tokens; an end that stands behind a response already is dropped."""
        ends = self._end.tokens
        answers = [turn._replace(content=self._written.without_trailing(turn.content, ends)) for turn in pair.responses.values()]
        chosen, rejected = pair.in_place(answers)
        pair = pair._replace(chosen=chosen, rejected=rejected)
        hidden = self._written.stand_ins(pair)
        prompt, responses = self._template.render_row(hidden.hide_pair(pair))
        ids = [hidden.encode(text, first=False) for text in responses]
        return self._finish(pair, (prompt, responses), hidden.encode(prompt, first=True), ids, hidden)


def _holds_all(pair: PreferencePair, prompt: str, answers: Sequence[str], hidden: StandIns | None) -> bool:
    """Whether rendered texts hold what each turn of the assistant says."""
    if hidden is not None:
        prompt, answers = hidden.show(prompt), [hidden.show(text) for text in answers]
    for response, text in zip(pair.responses.values(), answers, strict=True):
        content = response.content.strip()
        # It may begin in the prompt, where that ends with an opened <think>.
        if content not in text and content not in prompt[-len(content) :] + text:
            return False
    return all(turn.content.strip() in prompt for turn in pair.prompt if turn.role == "assistant")


def _fault_or(function: Callable[..., _Result], *arguments: Any) -> _Result | RowFault:
    try:
        return function(*arguments)
    except RowFault as fault:
        return fault
