"""``--split``: which split of a data set, by the names of its files, and which part of its rows.

Files are named as on the Hugging Face hub: ``train_prefs-00000-of-00003.parquet`` belongs to ``train_prefs``, and else the
nearest part of a path that holds one of the words of :data:`_ROLES` decides: ``helpful/test.jsonl``, ``dev/pairs.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from megatron_rmipo.errors import DataError

_ROLES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?!\d)")
_SPLIT = re.compile(r"([^\[\]]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class Split(NamedTuple):
    """What ``--split`` says: ``train``, ``train[:1000]``, ``train[10%:20%]``, ``[-100:]``.

    Attributes:
        name: None where it names a part alone.
        start, stop: bounds as written, such as ``-100`` or ``10%``; None where there is none.
    """

    name: str | None = None
    start: str | None = None
    stop: str | None = None

    @classmethod
    def parse(cls, text: str | None) -> Split:
        """Read the flag; None is the whole of the only split.

        Raises:
            DataError: it is not of that form.
        """
        if text is None:
            return cls()
        found = _SPLIT.fullmatch(text.strip())
        if found is None or not found[0]:
            raise DataError(
                f"--split {text}: expected a split, a part of it, or a part: train, train[:1000], train[10%:20%], [-100:]."
            )
        return cls(found[1] or None, found[2], found[3])

    @property
    def is_part(self) -> bool:
        """Whether it asks for less than all rows."""
        return self.start is not None or self.stop is not None

    @property
    def most_rows(self) -> int | None:
        """How many rows must be looked at, at most, to know which they are; None for all."""
        from_the_beginning = all(bound is None or bound.isdigit() for bound in (self.start, self.stop))
        return int(self.stop) if from_the_beginning and self.stop is not None else None

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """First row and the one behind the last, as ``datasets`` has them.

        Args:
            num_rows: rows there are, or :attr:`most_rows` where that is fewer.
        """
        start, stop = (_row(bound, num_rows) for bound in (self.start or "0", self.stop or "100%"))
        return start, max(start, stop)


def _row(bound: str, num_rows: int) -> int:
    row = round(int(bound[:-1]) * num_rows / 100) if bound.endswith("%") else int(bound)
    return min(max(row + num_rows if row < 0 else row, 0), num_rows)


def split_of(path: PurePath) -> str | None:
    """The split that a file belongs to by its path within its data set; None where that does not say."""
    shard = _SHARD.match(path.name)
    if shard is not None:
        return shard[1]
    for part in reversed(path.parts):
        roles = {_ROLE_OF[word] for word in _words(part) if word in _ROLE_OF}
        if roles:
            return roles.pop() if len(roles) == 1 else part
    return None


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def _has_role(split: str | None) -> bool:
    return split is not None and not _ROLE_OF.keys().isdisjoint(_words(split))


def files_of_split(paths: Sequence[PurePath], wanted: str | None, name: str) -> list[int]:
    """Which files to read, so that no split comes in without being asked for.

    Args:
        paths: of the files, within their data set.
        wanted: the name in ``--split``, None where it names none.
        name: the input as given, for messages.

    Raises:
        DataError: there are several splits and none is named, there is no such split, or a file might belong to it or not.
    """
    splits = [split_of(path) for path in paths]
    found = sorted({split for split in splits if split is not None})
    unnamed = [str(path) for path, split in zip(paths, splits, strict=True) if split is None]
    listed = ", ".join([*found, *([f"and files of no split ({', '.join(unnamed[:3])})"] if unnamed else [])])
    is_split_by_name = any(map(_has_role, found))
    if wanted is None:
        if len(set(splits)) > 1 and is_split_by_name:
            raise DataError(
                f"--input {name}: --split is needed. By the names of its files it has: {listed}.\nOr name the files one by one."
            )
        return list(range(len(paths)))
    chosen = [number for number, split in enumerate(splits) if split in (wanted, _ROLE_OF.get(wanted, wanted))]
    if not chosen and not is_split_by_name and wanted == "train":  # as on the hub, where nothing else is said
        return list(range(len(paths)))
    if not chosen:
        has = f"By the names of its files it has: {listed}" if found else "By their names its files are of no split"
        raise DataError(f"--input {name}: --split {wanted}: no such split. {has}.")
    if unnamed:
        raise DataError(
            f"--input {name}: --split {wanted}: {', '.join(unnamed[:3])} may belong to it or not, by name. "
            "Name the files one by one, or by a pattern."
        )
    return chosen
