"""Columns that a format does not read: those that would change what is learned are refused, the others are named."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.layouts.messages import is_empty
from megatron_rmipo.data.layouts.scores import SCORE_NAMES
from megatron_rmipo.data.reading.rows import PreferencePair, Row, shown
from megatron_rmipo.errors import DataError

# Without capitals, and without what stands between words.
_MEANINGFUL = frozenset(
    {
        *("prompt", "instruction", "instructions", "question", "query", "input", "inputs", "context", "history"),
        *("system", "systemprompt", "systemmessage", "conversation", "conversations", "messages"),
        *("tools", "functions", "toolcalls", "documents", "thinking", "reasoning", "reasoningcontent", "chattemplatekwargs"),
        *("image", "images", "video", "videos", "audio", "audios", "chosenimages", "rejectedimages"),
        *("label", "labels", "ktotag", "winner", "preference", "preferencestrength", "overallpreference"),
        *("rejectedresponse", "rejectedmessages"),
    }
)
# Columns that have a name of ours, by which any format, or the one that has "input", reads them.
_OURS = {"context": "input", "systemprompt": "system", "systemmessage": "system", "functions": "tools"}


def is_meaningful(name: str) -> bool:
    """Whether a column of that name, or the end of a path, would change what is learned, were it read."""
    words = _words(name)
    return "".join(words) in _MEANINGFUL or "winner" in words  # a verdict may be told by several: winner_model_a, winner_tie


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower().rpartition(".")[2])


def unread_columns(row: Row, expected: frozenset[str], pair: PreferencePair) -> list[str]:
    """The columns of a row that are not expected and say something that the pair does not hold.

    Args:
        row: columns under our names.
        expected: those that are read, or known to be left out.
        pair: what was read of the row. A text that is one of its turns was read.
    """
    texts = {turn.content.strip() for turn in (*pair.prompt, *pair.responses.values())}
    return [
        name
        for name in row
        if name not in expected
        and not is_empty(value := row[name])
        and not (isinstance(value, str) and value.strip() in texts)
        and not (name == "metadata" and isinstance(value, Mapping) and not SCORE_NAMES.isdisjoint(value))
    ]


def refuse_meaningful(unread: Mapping[str, object], form: str) -> None:
    """Refuse columns that change what is learned.

    Args:
        unread: names of columns nobody reads, each with a value of it.
        form: the data set's format.

    Raises:
        DataError: naming them, the formats that read them, and how to leave them out.
    """
    found = [name for name in unread if is_meaningful(name)]
    if not found:
        return
    lines = [f"  {name}, such as {shown(unread[name])}{_read_by(name, form)}" for name in found]
    raise DataError(
        f"format {form} does not read these columns, which would change what is learned:\n"
        + "\n".join(lines)
        + f"\nUse them with --format or --columns, or say --ignore-columns {','.join(found)}."
    )


def _read_by(name: str, form: str) -> str:
    """How a column could be read, for messages: under a name of ours, or by another format."""
    ways = [f"--format {other}" for other, made in FORMATS.items() if name in made.reads]
    ours = _OURS.get("".join(_words(name)))
    if ours is not None and (ours != "input" or ours in FORMATS[form].reads):
        ways.insert(0, f"--columns {ours}={name}")
    if not ways and "winner" in _words(name):
        return " (one column tells the verdict: without this one, what it says is lost)"
    return f" (read by {' or '.join(ways)})" if ways else ""
