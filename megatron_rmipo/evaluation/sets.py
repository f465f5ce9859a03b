"""The sets of ``--data``: prepared ones as they are, raw ones tokenized as the model sees them at inference."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.preparing.rejects import Reject
from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.data.reading.sources import SourceRow, load_payload, open_sources
from megatron_rmipo.data.store.manifest import store_paths
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.evaluation.questions import Kind, Question, question_of

_NAME = re.compile(r"[\w.-]+")
_ROWS, _PAIRS = "rows.jsonl", "pairs"


@dataclasses.dataclass(frozen=True)
class SetSource:
    """What a ``NAME=SOURCE`` of ``--data`` says.

    Attributes:
        name: how the set is called.
        source: prefix of prepared data, or file, directory, pattern or hub name.
        split: which split and which part of its rows, as ``--split`` of the data tool; None where it says nothing.
    """

    name: str
    source: str
    split: str | None

    @classmethod
    def parse(cls, text: str) -> SetSource:
        """Read ``NAME=SOURCE`` or ``NAME=SOURCE#SPLIT``.

        Raises:
            ConfigError: it is not of that form, or names a split of prepared data.
        """
        name, equals, source = text.partition("=")
        source, hash_sign, split = source.partition("#")
        if not (equals and source and _NAME.fullmatch(name)) or (hash_sign and not split):
            raise ConfigError(
                f"--data {text}: expected NAME=PREFIX of prepared data, or NAME=FILE, DIR or hub name, with #SPLIT behind it "
                "where it has several: rewardbench=allenai/reward-bench#filtered."
            )
        found = cls(name, source, split or None)
        if found.is_prepared and found.split is not None:
            raise ConfigError(f"--data {text}: prepared data have no splits. Leave #{split} out.")
        return found

    @property
    def is_prepared(self) -> bool:
        """Whether its source is the prefix of prepared data."""
        paths = store_paths(self.source)
        return all(paths[kind].is_file() for kind in ("bin", "idx", "json"))


@dataclasses.dataclass(frozen=True)
class AskedQuestion:
    """A question all of whose pairs are stored.

    Attributes:
        kind, subset, name: as of :class:`megatron_rmipo.evaluation.questions.Question`.
        row: where it stands among the rows of its source, counted from 0.
        pairs: numbers of its pairs in the store.
        answers: of each pair, which good and which bad answer it is made of.
    """

    kind: Kind
    subset: str
    name: str
    row: int
    pairs: list[int]
    answers: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set, prepared.

    Attributes:
        name: how it is called.
        source: where it is from, as the user named it.
        prefix: of the prepared data.
        questions: in the order of the rows.
        num_rows: rows of the source.
        left_out: reason -> rows that are not among the questions.
        examples: a row left out for each reason, where it stands and what is wrong.
    """

    name: str
    source: str
    prefix: str
    questions: list[AskedQuestion]
    num_rows: int
    left_out: dict[str, int]
    examples: list[str]

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """int64 ``[P]``: the stored pairs that count, question by question."""
        return np.array([pair for question in self.questions for pair in question.pairs], dtype=np.int64)

    @property
    def question_numbers(self) -> npt.NDArray[np.int64]:
        """int64 ``[P]``: which question each of :attr:`pairs` is of."""
        return np.repeat(np.arange(len(self.questions)), [len(question.pairs) for question in self.questions])

    @property
    def subsets(self) -> list[str]:
        """Of each of :attr:`pairs`, its question's."""
        return [question.subset for question in self.questions for _ in question.pairs]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :meth:`from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvaluationSet:
        """What :meth:`to_json` gave."""
        questions = [
            AskedQuestion(**{**one, "answers": [(good, bad) for good, bad in one["answers"]]}) for one in values["questions"]
        ]
        return cls(**{**values, "questions": questions})


@dataclasses.dataclass(frozen=True)
class Reading:
    """How raw rows are read.

    Attributes:
        tokenizer: the model's.
        tokenizer_name: where it is from.
        chat_template: as of the data tool; None for the tokenizer's own.
        seq_length: most tokens of a prompt with one of its responses; longer rows are left out.
        subset_column: the column of a row's subset; None for the first that is known.
    """

    tokenizer: PreferenceTokenizer
    tokenizer_name: str
    chat_template: str | None
    seq_length: int
    subset_column: str | None


def prepared_set(source: SetSource, num_pairs: int) -> EvaluationSet:
    """A set of prepared data, of which each pair is a question."""
    questions = [AskedQuestion("pair", "", "", row, [row], [(0, 0)]) for row in range(num_pairs)]
    return EvaluationSet(source.name, source.source, source.source, questions, num_pairs, {}, [])


def prepare_set(source: SetSource, folder: Path, reading: Reading) -> EvaluationSet:
    """Read and tokenize a raw set.

    Args:
        source: what to read.
        folder: where it is written to, of this set alone.
        reading: how.

    Raises:
        DataError: it cannot be read, its format is not recognised, or no row can be used.
    """
    place = source.source + (f"#{source.split}" if source.split else "")
    told = f"--data {source.name}={place}"
    try:
        rows = [row for one in open_sources(source.source, source.split) for row in one]
    except DataError as error:
        raise DataError(f"{told}: {error}") from None
    left_out = _LeftOut()
    asked: list[tuple[int, Question]] = []
    for number, row in enumerate(rows):
        try:
            asked.append((number, question_of(load_payload(row.payload), reading.subset_column)))
        except RowFault as fault:
            left_out.add(row, fault.reason, fault.message)
    if not asked:
        raise DataError(left_out.told(f"{told}: no row can be used"))
    folder.mkdir(parents=True)
    _write_rows(folder / _ROWS, asked)
    rejects = _tokenize(folder, reading, told, [rows[number] for number, question in asked for _ in question.rows])
    questions, stored, line = [], 0, 0
    for number, question in asked:
        lines = range(line + 1, line + 1 + len(question.rows))
        line = lines[-1]
        kept = [one for one in lines if one not in rejects]
        if len(kept) == len(lines):
            pairs = list(range(stored, stored + len(kept)))
            questions.append(AskedQuestion(question.kind, question.subset, question.name, number, pairs, question.answers))
        else:
            reject = next(rejects[one] for one in lines if one in rejects)
            left_out.add(rows[number], reject.reason, reject.message)
        stored += len(kept)
    if not questions:
        raise DataError(left_out.told(f"{told}: no row can be used"))
    prefix = str(folder / _PAIRS)
    counts, examples = dict(left_out.counts), list(left_out.examples.values())
    return EvaluationSet(source.name, place, prefix, questions, len(rows), counts, examples)


class _LeftOut:
    """Rows that are left out, counted by reason, the first of each kept."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, row: SourceRow, reason: str, message: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, f"{row.source}: {row.unit} {row.number}: {message} [{reason}]")

    def told(self, problem: str) -> str:
        """The problem, with an example of each reason."""
        return "\n".join([f"{problem}. The first of each kind:", *(f"  {one}" for one in self.examples.values())])


def _write_rows(path: Path, asked: list[tuple[int, Question]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in (row for _, question in asked for row in question.rows):
            stream.write(json.dumps(row, default=str) + "\n")


def _tokenize(folder: Path, reading: Reading, told: str, lines: list[SourceRow]) -> dict[int, Reject]:
    """Make the store of the rows written, which came from ``lines``; those that are not in it, by line, with the reason."""
    prefix = folder / _PAIRS
    options = PreprocessOptions(
        input=(str(folder / _ROWS),),
        tokenizer_model=reading.tokenizer_name,
        output_prefix=str(prefix),
        chat_template=reading.chat_template,
        seq_length=reading.seq_length,
        overlong="drop",
    )
    try:
        # Its note names flags that an evaluation does not have.
        manifest = preprocess(options, reading.tokenizer, tell_unread=False)
    except DataError as error:
        rejects = _read_rejects(Path(f"{prefix}.failed.rejects.jsonl"))
        if not rejects:
            raise DataError(f"{told}: {error}") from None
        left_out = _LeftOut()
        for line, reject in rejects.items():
            left_out.add(lines[line - 1], reject.reason, reject.message)
        raise DataError(left_out.told(f"{told}: none of its {len(rejects)} pairs can be used")) from None
    if not manifest.has_rejected or manifest.unpaired:
        raise DataError(f"{told}: its rows hold {manifest.kind}, and no two answers of which one is better.")
    if manifest.unread_columns:
        columns = ", ".join(manifest.unread_columns)
        print(f"note: {told}: not read: {columns}. Prepare the set where one of them counts.", file=sys.stderr)
    return _read_rejects(Path(f"{prefix}.rejects.jsonl"))


def _read_rejects(path: Path) -> dict[int, Reject]:
    if not path.is_file():
        return {}
    rejects = [Reject(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {reject.number: reject for reject in rejects}
