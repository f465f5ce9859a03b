"""What a column says of answers: whether the one is desirable, or which of two won."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from megatron_rmipo.data.reading.rows import Row, RowFault, shown, value_of
from megatron_rmipo.errors import DataError

Verdict = Literal["first", "second", "tie"]
LABEL_COLUMNS = ("label", "kto_tag")
_DESIRABLE: Mapping[object, bool] = types.MappingProxyType(
    {1: True, 0: False, -1: False, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False, "-1": False}
)
# By names without what stands between words, see :func:`_winner_value`.
_WINNERS: Mapping[object, Verdict] = types.MappingProxyType(
    {
        **dict.fromkeys(("first", "a", "modela", "responsea", "assistanta", "output1", "response1"), "first"),
        **dict.fromkeys(("second", "b", "modelb", "responseb", "assistantb", "output2", "response2"), "second"),
        **dict.fromkeys(("tie", "tiebothbad", "both", "bothbad", "neither", "draw", "equal", "same"), "tie"),
    }
)
_ONE_AND_TWO: Mapping[object, Verdict] = types.MappingProxyType({1: "first", 2: "second", 0: "tie", 1.5: "tie"})


def plain_value(value: object) -> object:
    """A value as tables of values have it: a number in any writing (true is 1), or text in small letters."""
    text = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(text, str | int | float):
        return None
    try:
        return float(text)
    except (ValueError, OverflowError):
        return text


def is_desirable(row: Row) -> bool:
    """The label of a row: true/false, yes/no, 1/0 or 1/-1, as such, as floats or as text.

    Raises:
        RowFault: there is none, or another value.
    """
    name = next((name for name in LABEL_COLUMNS if row.get(name) is not None), LABEL_COLUMNS[0])
    label = value_of(row, name)
    found = _DESIRABLE.get(plain_value(label))
    if found is None:
        remedy = f"; --ignore-columns {name} leaves out one that judges no answer"
        raise RowFault("bad_label", name, f"true/false, yes/no, 1/0 or 1/-1 expected, found {shown(label)}{remedy}")
    return found


def refuse_three_labels(rows: Iterable[Row]) -> None:
    """Refuse labels of which one may mean neither: 1, 0 and -1 in the same data.

    Raises:
        DataError: naming the column.
    """
    labels = [plain_value(row[name]) for row in rows for name in LABEL_COLUMNS if row.get(name) is not None]
    if 0.0 in labels and -1.0 in labels:
        raise DataError(
            "the labels are 0 and -1 both, so that one of them may mean neither. Leave out the rows that are neither, "
            "and give the others true or false."
        )


def by_sign(value: Any) -> Verdict | None:
    """HelpSteer's strengths: below 0 the first is better, above it the second."""
    number = plain_value(value)
    if not isinstance(number, float) or not -3 <= number <= 3:
        return None
    return "first" if number < 0 else "second" if number > 0 else "tie"


def by_scale(value: Any) -> Verdict | None:
    """AlpacaEval's preference: from 1, the first, to 2, the second, as weighted annotators write it; 1.5 or 0 is a tie."""
    number = plain_value(value)
    if not isinstance(number, float) or not (number == 0 or 1 <= number <= 2):
        return None
    return "tie" if number in (0, 1.5) else "first" if number < 1.5 else "second"


def _winner_value(value: object) -> object:
    """A value as :func:`plain_value` has it, but true and false as 1 and 0, and ``[[A]]`` or ``Model_A`` as a name alone."""
    plain = plain_value(value)
    if not isinstance(plain, str):
        return plain
    name = re.sub(r"[\s_\-()\[\]]", "", plain) or plain
    return {"true": 1.0, "false": 0.0}.get(name, name)


def by_values(values: Mapping[object, Verdict]) -> Callable[[Any], Verdict | None]:
    """A reading by a table of values, in the form of :func:`_winner_value`."""
    return lambda value: values.get(_winner_value(value))


by_name, by_number = by_values(_WINNERS), by_values(_ONE_AND_TWO)


def parse_winner_values(text: str) -> dict[object, Verdict]:
    """``first=1,second=2,tie=0`` -> values and their meanings; a meaning may be given several times, ``tie=0,tie=3``.

    Raises:
        DataError: not of that form, a value with two meanings, or first or second left out.
    """
    values: dict[object, Verdict] = {}
    for item in text.split(","):
        meaning, equals, value = (part.strip() for part in item.partition("="))
        if meaning not in ("first", "second", "tie") or not equals or not value:
            raise DataError(f"--winner-values: {item.strip()!r} is not first=VALUE, second=VALUE or tie=VALUE.")
        if values.setdefault(_winner_value(value), meaning) != meaning:  # type: ignore[arg-type]
            raise DataError(f"--winner-values: {value} has two meanings, {values[_winner_value(value)]} and {meaning}.")
    if missing := {"first", "second"} - set(values.values()):
        raise DataError(f"--winner-values {text}: no value means {' or '.join(sorted(missing))}.")
    return values


def settle_winner_values(rows: Iterable[Row]) -> dict[object, Verdict]:
    """What the values of a column ``winner`` mean where nothing says so: names, or the numbers 1 and 2 where both are there.

    Raises:
        DataError: its values have no meaning that goes without saying.
    """
    found = {_winner_value(row["winner"]): row["winner"] for row in rows if row.get("winner") is not None}
    if not found.keys() - _WINNERS.keys():
        return dict(_WINNERS)
    if {1.0, 2.0} <= found.keys() <= _ONE_AND_TWO.keys():
        return dict(_ONE_AND_TWO)
    values = ", ".join(repr(value) for value in list(found.values())[:8])
    raise DataError(
        f"the winner's column holds {values}: say which value means what, such as --winner-values first=1,second=2,tie=0."
    )


def majority(verdicts: Iterable[Verdict]) -> Verdict:
    """What more than half of the annotators say; else a tie."""
    given = list(verdicts)
    return next((verdict for verdict in given if 2 * given.count(verdict) > len(given)), "tie")
