"""PreferencePair -> token ids: rendering, encoding, ends of sequences, and what happens to pairs that are too long."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_rmipo.data.chat import ChatTemplate
from megatron_rmipo.data.official import encode_official, render_official
from megatron_rmipo.data.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.data.tokenize import PreferenceTokenizer, with_one_bos
from megatron_rmipo.errors import DataError

OVERLONG_POLICIES = ("left-truncate-prompt", "drop", "error", "official")
# Private-use characters stand for special tokens that users wrote, until the text around them is rendered.
_STAND_IN_BASES = (0xF0000, 0x100000)
_Result = TypeVar("_Result")
_FEW_TOKENS = 4
_SLACK_TOKENS = 2
_MAX_CUTS = 12


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair; ``truncated`` says that its prompt (or, by the official policy, a response) was cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt with the longer response."""
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
                raise DataError(f"--max-prompt-length belongs to --overlong official; {self.overlong} does not use it. Leave it out.")
        elif self.max_prompt_length is None:
            raise DataError("--overlong official needs --max-prompt-length (the paper: 1800 with --seq-length 2048).")
        elif not 0 < self.max_prompt_length < self.seq_length:
            raise DataError(f"--max-prompt-length {self.max_prompt_length}: must lie between 1 and --seq-length {self.seq_length} less 1.")


class PairEncoder:
    """Encodes pairs with one tokenizer, template and length policy.

    Special tokens that users wrote into a turn are encoded as ordinary text (but not with the ``none`` template, whose texts are rendered
    already, nor by the official policy): nothing but the template can end a response.

    Raises:
        DataError: nothing would mark the end of a response.
    """

    def __init__(self, tokenizer: PreferenceTokenizer, template: ChatTemplate, policy: LengthPolicy) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._template, self._policy = template, policy
        self._bos, self._eos = tokenizer.info.bos_token_id, tokenizer.info.eos_token_id
        self._special_texts = sorted(self._backend.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._special_texts))) if self._special_texts else None
        self._stop = self._closing_token()
        if self._stop is None and self._eos is None:
            raise DataError(
                f"{tokenizer.spec.name}: the tokenizer has no EOS token and the chat template {template.name} ends answers with no special "
                "token, so a response would have no end. Choose a template with an end-of-turn token."
            )

    def encode(self, pairs: Sequence[PreferencePair]) -> list[EncodedPair | RowFault]:
        """Encode pairs, in order; a pair that cannot be used gives its fault."""
        if self._policy.overlong == "official":
            return [_fault_or(functools.partial(self._encode_official, pair)) for pair in pairs]
        results: list[EncodedPair | RowFault | None] = []
        texts: list[tuple[str, list[str]]] = []
        for pair in pairs:
            written = (*(turn.content for turn in pair.prompt), pair.chosen, pair.rejected)
            if not self._template.verbatim and self._has_special(written):
                results.append(_fault_or(functools.partial(self._encode_with_stand_ins, pair)))
                continue
            rendered = _fault_or(functools.partial(self._template.render_pair, pair.prompt, (pair.chosen, pair.rejected)))
            if isinstance(rendered, RowFault):
                results.append(rendered)
            else:
                results.append(None)
                texts.append(rendered)
        prompts = iter(self._backend.first([prompt for prompt, _ in texts]))
        responses = iter(self._backend.continuation([text for _, both in texts for text in both]))
        finished: list[EncodedPair | RowFault] = []
        for pair, result in zip(pairs, results, strict=True):
            if result is None:
                ids = (next(prompts), next(responses), next(responses))
                finished.append(_fault_or(functools.partial(self._finish, pair, *ids)))
            else:
                finished.append(result)
        return finished

    def _encode_official(self, pair: PreferencePair) -> EncodedPair:
        assert self._policy.max_prompt_length is not None
        texts = render_official(self._template, pair)
        return EncodedPair(*encode_official(self._tokenizer, *texts, self._policy.seq_length, self._policy.max_prompt_length))

    def _has_special(self, texts: Sequence[str]) -> bool:
        return self._special is not None and any(self._special.search(text) for text in texts)

    def _finish(self, pair: PreferencePair, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
        """Set BOS and ends, check, and apply the length policy."""
        encoded = EncodedPair(
            self._checked_prompt(prompt),
            self._ended(chosen, "chosen", pair.chosen),
            self._ended(rejected, "rejected", pair.rejected),
        )
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
        special = set(self._backend.special_ids.values())
        return next((i for i in self._backend.continuation([self._template.closing])[0] if i in special), None)

    def _ended(self, ids: list[int], field: str, text: str) -> list[int]:
        """The response with its end-of-turn token (the template's, else EOS) at its end, exactly once."""
        if self._template.verbatim:
            content, end = self._verbatim_content(ids, field)
        elif self._stop is None:
            assert self._eos is not None
            content, end = ids, self._eos
        elif self._stop in ids:
            content, end = ids[: ids.index(self._stop)], self._stop
        else:
            raise RowFault("template", field, f"the chat template {self._template.name} did not end this answer")
        if not content or (len(content) <= _FEW_TOKENS and not self._backend.plain([text.strip()])[0]):
            raise RowFault("empty_response", field, f"the response encodes to no tokens: {text[:40]!r}")
        return [*content, end]

    def _verbatim_content(self, ids: list[int], field: str) -> tuple[list[int], int]:
        """A rendered response up to its first special token, and that token, or EOS where there is none; white space may follow."""
        special = set(self._backend.special_ids.values())
        start = next((i for i, token in enumerate(ids) if token in special), len(ids))
        opens = start < len(ids) and ids[start] == self._bos != self._eos
        rest = [token for token in ids[start + 1 :] if token not in special]
        if opens or self._tokenizer.decode(rest).strip():
            raise RowFault("special_token", field, "a special token stands inside the response, with text behind it")
        assert self._eos is not None
        return ids[:start], ids[start] if start < len(ids) else self._eos

    def _shortened(self, pair: PreferencePair, prompt: list[int], room: int) -> list[int]:
        """The prompt's ids in at most ``room`` tokens: oldest turns go first, then the beginning of the last user turn's text.

        BOS, the system turn and the template's own text stay.
        """
        if self._template.verbatim:
            head = prompt[:1] if self._bos is not None else []
            if room <= len(head):
                raise self._no_room(room)
            return head + prompt[len(head) - room :]
        system = pair.prompt[:1] if pair.prompt[0].role == "system" else ()
        turns = pair.prompt[len(system) :]
        starts = [index for index, turn in enumerate(turns) if turn.role == "user"] or [0]
        low, high = 0, len(starts)  # starts[:low + 1] are known not to fit
        best: list[int] | None = None
        while high - low > 1:
            middle = (low + high) // 2
            ids = self._encode_prompt((*system, *turns[starts[middle] :]))
            if len(ids) <= room:
                best, high = ids, middle
            else:
                low = middle
        return best if best is not None else self._cut_text(system, turns[starts[-1] :], room)

    def _cut_text(self, system: tuple[Turn, ...], turns: tuple[Turn, ...], room: int) -> list[int]:
        """Keep as much of the end of the first turn's text as fits, found by interpolation."""
        text = turns[0].content
        low, high = 0, len(text)  # characters kept: low fits or is zero, high does not fit
        best: list[int] | None = None
        chars_per_token = max(1.0, len(text) / max(1, len(self._backend.plain([text])[0])))
        keep = high - 1
        for _ in range(_MAX_CUTS):
            ids = self._encode_prompt((*system, Turn(turns[0].role, text[len(text) - keep :]), *turns[1:]))
            if len(ids) <= room:
                best, low = ids, keep
                if len(ids) >= room - _SLACK_TOKENS:
                    break
            else:
                high = keep
            if high - low <= 1:
                break
            guess = keep + int((room - len(ids)) * chars_per_token)
            keep = guess if low < guess < high else (low + high) // 2
        if best is None:
            raise self._no_room(room)
        return best

    def _no_room(self, room: int) -> RowFault:
        longest = self._policy.seq_length - room
        return RowFault(
            "response_too_long",
            "",
            f"the longer response has {longest} tokens, --seq-length {self._policy.seq_length} leaves {max(room, 0)} for the prompt",
        )

    def _encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        written = [turn.content for turn in turns]
        if not self._has_special(written):
            return with_one_bos(self._backend.first([self._template.render(turns, add_generation_prompt=True)])[0], self._bos)
        base = _free_base(written, len(self._special_texts))
        hidden = [Turn(turn.role, self._hide(turn.content, base)) for turn in turns]
        return with_one_bos(self._encode_hidden(self._template.render(hidden, add_generation_prompt=True), base, first=True), self._bos)

    def _encode_with_stand_ins(self, pair: PreferencePair) -> EncodedPair:
        """Encode a pair in which users wrote special tokens: those become ordinary text, an end written behind a response is dropped."""
        chosen, rejected = (self._without_written_end(response) for response in (pair.chosen, pair.rejected))
        pair = PreferencePair(pair.prompt, chosen, rejected)
        base = _free_base([*(turn.content for turn in pair.prompt), chosen, rejected], len(self._special_texts))
        hidden = tuple(Turn(turn.role, self._hide(turn.content, base)) for turn in pair.prompt)
        prompt, responses = self._template.render_pair(hidden, (self._hide(chosen, base), self._hide(rejected, base)))
        ids = [self._encode_hidden(text, base, first=False) for text in responses]
        return self._finish(pair, self._encode_hidden(prompt, base, first=True), *ids)

    def _without_written_end(self, response: str) -> str:
        ends = [text for text, index in self._backend.special_ids.items() if index in (self._eos, self._stop)]
        shorter = response.rstrip()
        while any(shorter.endswith(end) for end in ends):
            shorter = next(shorter.removesuffix(end) for end in ends if shorter.endswith(end)).rstrip()
            response = shorter
        return response

    def _hide(self, text: str, base: int) -> str:
        if self._special is None:
            return text
        return self._special.sub(lambda match: chr(base + self._special_texts.index(match.group())), text)

    def _encode_hidden(self, text: str, base: int, *, first: bool) -> list[int]:
        stand_ins = f"([{chr(base)}-{chr(base + len(self._special_texts) - 1)}])"
        ids: list[int] = []
        for position, part in enumerate(re.split(stand_ins, text)):
            if position % 2:
                ids += self._backend.plain([self._special_texts[ord(part) - base]])[0]
            elif part:
                ids += (self._backend.first if first and position == 0 else self._backend.continuation)([part])[0]
        return ids


def _free_base(texts: Sequence[str], count: int) -> int:
    """A range of private-use characters that the texts do not use."""
    for base in _STAND_IN_BASES:
        if not any(base <= ord(char) < base + count for text in texts for char in text):
            return base
    raise RowFault("malformed", "", "the text uses both supplementary private-use areas of Unicode beside special tokens")


def _fault_or(function: Callable[[], _Result]) -> _Result | RowFault:
    try:
        return function()
    except RowFault as fault:
        return fault
