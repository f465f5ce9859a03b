"""A row -> a checked :class:`PreferencePair`: its format, what stands beside the answers in any format, and the checks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_rmipo.data.layouts.conversations import with_system
from megatron_rmipo.data.layouts.formats import FORMATS, refuse_mixed
from megatron_rmipo.data.layouts.labels import Verdict, by_values
from megatron_rmipo.data.layouts.leftovers import is_meaningful, unread_columns
from megatron_rmipo.data.layouts.messages import UNLEARNED, without_fields
from megatron_rmipo.data.layouts.scores import SCORE_NAMES, VALUE_COLUMNS, compare_scores, pair_values
from megatron_rmipo.data.layouts.variables import VARIABLE_COLUMNS, template_variables
from megatron_rmipo.data.layouts.which_won import WHICH_WON
from megatron_rmipo.data.reading.columns import column_names, rename_columns
from megatron_rmipo.data.reading.rows import NOTHING, PreferencePair, Row, RowFault, Turn, shown

_BESIDE = frozenset({"system", *VARIABLE_COLUMNS, *VALUE_COLUMNS})
_SCORE_HOLDERS = SCORE_NAMES | {"metadata"}
_fields_of = operator.attrgetter("fields")


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Attributes:
        format: a key of ``FORMATS``.
        columns: our column names -> theirs.
        keep_ties: whether pairs with two equal scores stay.
        on_inverted: what becomes of pairs whose chosen answer scores lower, one of ``scores.ON_INVERTED``.
        winner_values: values of the winner's column -> what they mean; None as the format has it.
        ignored: columns to be left out, by their own names.
        unread: columns known to be read by nobody.
        values: names of the numbers that stand beside each pair.
    """

    format: str
    columns: dict[str, str]
    keep_ties: bool = False
    on_inverted: str = "keep"
    winner_values: dict[object, Verdict] | None = None
    ignored: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    values: tuple[str, ...] = ()


class RowReader:
    """Reads rows, in one process.

    Attributes:
        counts: what happened to pairs that were read: ``inverted``, and ``unread/COLUMN`` for columns not known before.
    """

    def __init__(self, options: RowOptions) -> None:
        self._options = options
        self._parse: Callable[[Row], PreferencePair] = FORMATS[options.format].parse
        if options.winner_values is not None:
            layout = WHICH_WON[options.format]
            self._parse = dataclasses.replace(layout, verdict=by_values(options.winner_values)).parse
        self._has_one_answer = FORMATS[options.format].kind != "pairs"
        self._expected = columns_read(options.format, options.columns) | options.unread
        self.counts: collections.Counter[str] = collections.Counter()

    def __call__(self, row: Row) -> PreferencePair:
        """The row's pair.

        Raises:
            RowFault: the row cannot be used.
        """
        try:
            row = own_columns(row, self._options.columns, self._options.ignored)
            pair = self._read(row)
            self._check_values(pair)
            if not row.keys() <= self._expected:
                self._count_unread(row, pair)
        except RecursionError:
            raise RowFault("malformed", "", "nested too deeply") from None
        return pair

    def survey(self, rows: Iterable[Row]) -> tuple[dict[str, object], tuple[str, ...]]:
        """What those rows that can be used have beside their pairs.

        Returns:
            The columns that nobody reads, each with its first value; the names of the numbers of a pair, sorted.
        """
        unread: dict[str, object] = {}
        values: set[str] = set()
        for row in (own_columns(row, self._options.columns, self._options.ignored) for row in rows):
            with contextlib.suppress(RowFault, RecursionError):
                pair = self._read(row)
                values.update(pair.values)
                for name in unread_columns(row, self._expected, pair):
                    unread.setdefault(name, row[name])
        self.counts.clear()
        return unread, tuple(sorted(values))

    def _check_values(self, pair: PreferencePair) -> None:
        """Refuse a row that lacks a number which the data set has, or has one that it lacks: neither is made up or lost."""
        for column in self._options.values:
            if column not in pair.values:
                raise RowFault("missing_field", column, f"absent or null, but the data set has a {column} beside every pair")
        for column in pair.values:
            if column not in self._options.values:
                raise RowFault("mixed", column, f"a {column}, which the first rows of the data set do not have")

    def _read(self, row: Row) -> PreferencePair:
        difference, scores = 1.0, ""
        if self._has_one_answer:
            refuse_mixed(row, self._options.format)
        elif not _SCORE_HOLDERS.isdisjoint(row):
            difference, scores = compare_scores(row)
            if difference == 0 and not self._options.keep_ties:
                raise RowFault("tied", "rejected", scores)
        try:
            pair = parse_row(row, self._parse)
        except RowFault:  # a row of one answer among pairs never parses, so that pairs need not be looked at twice
            refuse_mixed(row, self._options.format)
            raise
        return pair if difference >= 0 else self._set_right(pair, scores)

    def _count_unread(self, row: Row, pair: PreferencePair) -> None:
        for name in unread_columns(row, self._expected, pair):
            if is_meaningful(name):
                raise RowFault("unread", name, f"{shown(row[name])} would change what is learned; see --ignore-columns")
            self.counts[f"unread/{name}"] += 1

    def _set_right(self, pair: PreferencePair, scores: str) -> PreferencePair:
        """A pair whose chosen answer scores lower, as ``on_inverted`` has it."""
        if self._options.on_inverted in ("drop", "error"):
            raise RowFault("inverted", "chosen", scores)
        self.counts["inverted"] += 1
        if self._options.on_inverted == "keep":
            return pair
        values = {name: -value if name == "margin" else value for name, value in pair.values.items()}
        return pair._replace(chosen=pair.rejected, rejected=pair.chosen, values=values)


def own_columns(row: Row, columns: Mapping[str, str], ignored: frozenset[str]) -> Row:
    """The row under our names, without the columns, and the fields of messages, to be left out."""
    row = rename_columns(row, columns)
    if not ignored:
        return row
    kept = {name: value for name, value in row.items() if name not in ignored or name in columns}
    with contextlib.suppress(RecursionError):  # a row nested so deeply is refused where it is read
        return {name: value if name in VARIABLE_COLUMNS else without_fields(value, ignored) for name, value in kept.items()}
    return kept


def columns_read(form: str, columns: Mapping[str, str]) -> frozenset[str]:
    """The columns that are read of rows of a format, our names and those under which ``--columns`` looks for nested values."""
    of_pairs = SCORE_NAMES if FORMATS[form].kind == "pairs" else frozenset[str]()
    return FORMATS[form].reads | _BESIDE | of_pairs | column_names(columns)


def parse_row(row: Row, parse: Callable[[Row], PreferencePair]) -> PreferencePair:
    """Parse one row and check the pair.

    Args:
        row: columns under our names.
        parse: that of one of ``formats.FORMATS``.

    Raises:
        RowFault: the row cannot be used.
    """
    pair = parse(row)
    if not _BESIDE.isdisjoint(row):
        pair = _with_what_stands_beside(row, pair)
    if "system" in [turn.role for turn in pair.prompt]:
        pair = pair._replace(prompt=tuple(turn for turn in pair.prompt if turn.role != "system" or turn.content.strip()))
    _check_turns(pair.prompt)
    responses = pair.responses
    for field, response in responses.items():
        if not response.content.strip() and not response.fields.get("tool_calls"):
            raise RowFault("empty_response", field, "the response has no text")
    if pair.chosen is not None and pair.rejected is not None and _stripped(pair.chosen) == _stripped(pair.rejected):
        raise RowFault("identical", "rejected", "the same text as chosen")
    texts = [*(("prompt", turn.content) for turn in pair.prompt), *((field, turn.content) for field, turn in responses.items())]
    if pair.variables or any(map(_fields_of, (*pair.prompt, *responses.values()))):
        pair = _with_fields_settled(pair)
        texts += _texts_of_fields(pair)
    _require_encodable(texts)
    return pair


def _with_what_stands_beside(row: Row, pair: PreferencePair) -> PreferencePair:
    if row.get("system") is not None:
        pair = pair._replace(prompt=with_system(pair.prompt, row))
    return pair._replace(variables=template_variables(row) or NOTHING, values=pair_values(row) or NOTHING)


def _stripped(turn: Turn) -> Turn:
    return turn._replace(content=turn.content.strip())


def _check_turns(turns: Sequence[Turn]) -> None:
    if not any(map(str.strip, [turn.content for turn in turns if turn.role != "system"])):
        raise RowFault("empty_prompt", "prompt", "the prompt has no text")
    roles = [turn.role for turn in turns]
    if roles[-1] not in ("user", "tool"):
        raise RowFault("bad_turns", "prompt", f"the prompt ends with a turn of the {roles[-1]}, not of the user")
    if "system" in roles[1:]:
        raise RowFault("bad_turns", "prompt", "a system turn stands behind the first turn")


def _with_fields_settled(pair: PreferencePair) -> PreferencePair:
    """The pair without the marks of turns that are not learned, of which an answer must have none."""
    for field, response in pair.responses.items():
        if UNLEARNED in response.fields:
            raise RowFault("unread", field, "the answer is marked as one that is not to be learned")
    if not any(UNLEARNED in turn.fields for turn in pair.prompt):
        return pair
    return pair._replace(prompt=tuple(_without_mark(turn) for turn in pair.prompt))


def _without_mark(turn: Turn) -> Turn:
    return turn._replace(fields={name: value for name, value in turn.fields.items() if name != UNLEARNED} or NOTHING)


def _texts_of_fields(pair: PreferencePair) -> list[tuple[str, str]]:
    """(field, text) of all that a template may show of a pair beside its turns' text."""
    named = [
        *(("prompt", turn.fields) for turn in pair.prompt),
        *((field, turn.fields) for field, turn in pair.responses.items()),
    ]
    named.append(("prompt", pair.variables))
    return [(field, json.dumps(dict(values), ensure_ascii=False, default=str)) for field, values in named if values]


def _require_encodable(texts: Sequence[tuple[str, str]]) -> None:
    """Refuse (field, text) that UTF-8 cannot write: JSON can spell half of a surrogate pair, and the tokenizers stop at it."""
    try:
        "".join([text for _, text in texts]).encode()
    except UnicodeEncodeError:
        for field, text in texts:
            _name_half_pair(field, text)


def _name_half_pair(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = shown(text[max(0, error.start - 10) : error.start + 10])
        message = f"character {error.start + 1} is half of a surrogate pair, near {around}"
        raise RowFault("not_encodable", field, message) from None
