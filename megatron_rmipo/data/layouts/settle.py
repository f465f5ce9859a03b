"""How a data set's rows are read, settled once by the flags and its first rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from megatron_rmipo.data.layouts.formats import FORMATS, recognise_format
from megatron_rmipo.data.layouts.labels import Verdict, parse_winner_values, refuse_three_labels, settle_winner_values
from megatron_rmipo.data.layouts.leftovers import refuse_meaningful
from megatron_rmipo.data.layouts.reader import RowOptions, RowReader, columns_read, own_columns
from megatron_rmipo.data.layouts.which_won import WHICH_WON
from megatron_rmipo.data.reading.rows import Row
from megatron_rmipo.errors import DataError


def settle_reading(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    form: str | None = None,
    ignore_columns: str | None = None,
    winner_values: str | None = None,
    keep_ties: bool = False,
    on_inverted: str = "keep",
) -> RowOptions:
    """How to read a data set.

    Args:
        rows: its first rows, under their own names.
        columns: our column names -> theirs.
        form: the format; None for that of the rows.
        ignore_columns, winner_values: the flags' texts.
        keep_ties, on_inverted: see :class:`RowOptions`.

    Raises:
        DataError: a flag does nothing or contradicts another, the format is not recognised, a column that would change what is
            learned is not read, or the values of a label's or winner's column have no clear meaning.
    """
    ignored = _ignored(ignore_columns, columns)
    ours = [own_columns(row, columns, ignored) for row in rows]
    form = form or recognise_format(ours)
    _refuse_idle_flags(form, columns, winner_values, keep_ties=keep_ties, on_inverted=on_inverted)
    if FORMATS[form].kind == "unpaired":
        refuse_three_labels(ours)
    values: dict[object, Verdict] | None = None
    if winner_values is not None:
        values = parse_winner_values(winner_values)
    elif form == "which_won":
        values = settle_winner_values(ours)
    options = RowOptions(form, dict(columns), keep_ties, on_inverted, values, ignored)
    unread, numbers = RowReader(options).survey(rows)
    refuse_meaningful(unread, form)
    return dataclasses.replace(options, unread=frozenset(unread), values=numbers)


def unread_note(names: Collection[str], form: str) -> str:
    """What to say of columns that nobody reads."""
    found = sorted(names)
    return (
        f"not read by format {form}: {', '.join(found)}. If that is right, --ignore-columns {','.join(found)} says so; "
        "--columns NAME=COLUMN makes one count, such as margin=COLUMN"
    )


def _ignored(text: str | None, columns: Mapping[str, str]) -> frozenset[str]:
    """The columns of the flag; they need not be in the first rows, and a misspelt one is named where its column is."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name in columns.values():
            raise DataError(f"--ignore-columns {name}: --columns reads it. Leave it out of one of them.")
    return frozenset(names)


def _refuse_idle_flags(
    form: str, columns: Mapping[str, str], winner_values: str | None, *, keep_ties: bool, on_inverted: str
) -> None:
    """Refuse what would do nothing in a format."""
    read = columns_read(form, {})
    for ours, theirs in columns.items():
        if ours not in read:
            readers = [name for name in FORMATS if ours in columns_read(name, {})]
            raise DataError(
                f"--columns {ours}={theirs}: format {form} reads no {ours}. Those that do: {', '.join(readers)}; "
                "name one with --format, or leave it out."
            )
    if winner_values is not None and form not in WHICH_WON:
        raise DataError(f"--winner-values: format {form} has no winner's column; those that do: {', '.join(WHICH_WON)}.")
    if FORMATS[form].kind != "pairs" and (keep_ties or on_inverted != "keep"):
        flag = "--keep-ties" if keep_ties else f"--on-inverted {on_inverted}"
        raise DataError(f"{flag}: format {form} has no two answers whose scores could be compared. Leave it out.")
