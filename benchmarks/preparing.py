"""Preparing a data set from rows, beside the tokenizer's own batch encoding of the same texts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

from tokenizers import Encoding, Tokenizer

from benchmarks.measure import Spread, timed
from megatron_rmipo.data.encoding.backends import Backend
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess


class Recorder:
    """A backend that keeps the texts of every call, and their ids."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.special_ids, self.added_ids = backend, backend.special_ids, backend.added_ids
        self.calls: list[tuple[str, list[str], list[list[int]]]] = []
        self.decode, self.vocabulary = backend.decode, backend.vocabulary
        self.first, self.continuation, self.plain = (
            functools.partial(self._encode, name) for name in ("first", "continuation", "plain")
        )

    def _encode(self, name: str, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = getattr(self._backend, name)(texts)
        self.calls.append((name, list(texts), [list(one) for one in ids]))  # the caller may change them
        return ids


@dataclasses.dataclass(frozen=True)
class Preparing:
    """One input prepared in one process, and its tokenizer alone.

    Attributes:
        source: name of the lengths that were replayed, or of the files.
        pairs, tokens: in the data set.
        encoded: tokens the tokenizer gave: rendered text of pairs, some of it twice where a prompt was too long.
        seconds, cpu_seconds: from opening the input to the finished data set, the tokenizer loaded before.
        bare_cpu_seconds: ``encode_batch`` of the same texts in the same calls, and the ids of its results.
        fast_cpu_seconds: the same with ``encode_batch_fast``, which keeps no offsets; it is what preparing calls.
        share, fast_share: bare and fast CPU time / CPU time, the part of the tokenizer's own speed that is reached.
    """

    source: str
    pairs: int
    tokens: int
    encoded: int
    seconds: Spread
    cpu_seconds: Spread
    bare_cpu_seconds: Spread
    fast_cpu_seconds: Spread
    share: Spread
    fast_share: Spread


def measure_preparing(source: str, tokenizer: PreferenceTokenizer, job: PreprocessOptions, repeats: int) -> Preparing:
    """Prepare once to see which texts are encoded, then time preparing and encoding in turns."""
    backend = tokenizer.backend
    tokenizer.backend = recorder = Recorder(backend)
    bare = Tokenizer.from_str(str(tokenizer.spec.model))
    bare.no_truncation()
    bare.no_padding()
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars
        manifest = preprocess(job, tokenizer)
        tokenizer.backend = backend
        check_agreement(recorder, bare)
        calls = [texts for _, texts, _ in recorder.calls]
        times = [
            (
                timed(lambda: preprocess(job, tokenizer)),
                timed(lambda: encode_alone(bare.encode_batch, calls)),
                timed(lambda: encode_alone(bare.encode_batch_fast, calls)),
            )
            for _ in range(repeats)
        ]
    ours, alone, fast = ([cpu for _, cpu in column] for column in zip(*times, strict=True))
    return Preparing(
        source=source,
        pairs=manifest.num_pairs,
        tokens=manifest.num_tokens,
        encoded=sum(len(one) for _, _, ids in recorder.calls for one in ids),
        seconds=Spread.of([one[0][0] for one in times]),
        cpu_seconds=Spread.of(ours),
        bare_cpu_seconds=Spread.of(alone),
        fast_cpu_seconds=Spread.of(fast),
        share=Spread.of([theirs / own for own, theirs in zip(ours, alone, strict=True)]),
        fast_share=Spread.of([theirs / own for own, theirs in zip(ours, fast, strict=True)]),
    )


def encode_alone(encode: Callable[..., list[Encoding]], calls: Sequence[Sequence[str]]) -> None:
    """What preparing data cannot do without: the tokenizer's batch call, and the ids it found."""
    for texts in calls:
        for encoding in encode(texts, add_special_tokens=False):
            encoding.ids  # noqa: B018 - reading it makes the list


def check_agreement(recorder: Recorder, bare: Tokenizer) -> None:
    """Check that the tokenizer alone finds the same ids.

    Prompts must be the same. So must responses, unless the tokenizer puts a space before a text that a continuation does not get.
    """
    names = ["first"]
    if recorder.first(["a"]) == recorder.continuation(["a"]):
        names.append("continuation")
    del recorder.calls[-2:]
    for name, texts, ids in recorder.calls:
        if name in names:
            alone = [encoding.ids for encoding in bare.encode_batch_fast(texts, add_special_tokens=False)]
            assert alone == ids, f"the tokenizer alone encodes other tokens than preprocessing did: {name} {texts[0][:80]!r}"
