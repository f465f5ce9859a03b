"""The files that a directory or a pattern stands for: all its data files, in sorted order, or an error that names the others."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_rmipo.errors import DataError

_NO_DATA_NAMES = (
    *("readme", "readme.txt", "license", "license.txt", "licence", "notice", "notice.txt", "citation.cff", "makefile"),
    *("requirements.txt", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "_success"),
)
_NO_DATA_SUFFIXES = (
    *(".md", ".rst", ".yaml", ".yml", ".toml", ".py", ".sh", ".ipynb", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf"),
    *(".crc", ".md5", ".sha256", ".lock"),
)
# What preparing leaves beside its data sets.
_PREPARED_ENDINGS = (".bin", ".idx", ".rejects.jsonl", ".incomplete.json")
_MOST_NAMED = 5


class Found(NamedTuple):
    """Files that an input stands for.

    Attributes:
        root: the folder that holds them all.
        files: data files, in sorted order.
        left_out: names of files that are known to be no data.
    """

    root: Path
    files: list[Path]
    left_out: list[str]


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern for files."""
    return glob.has_magic(name)


def find_files(name: str, suffixes: Collection[str]) -> Found:
    """The data files of a directory or pattern.

    Args:
        name: as given: a directory, taken with all it holds, or a pattern with ``*``, ``?``, ``[...]`` or ``**``.
        suffixes: of the kinds of file that are read, see :func:`kind_of`.

    Raises:
        DataError: there is none, or there are files of other kinds.
    """
    path = Path(name).expanduser()
    root = path if path.is_dir() else _fixed_part(path)
    try:
        found = _files_below(path) if path.is_dir() else _matches(path)
    except OSError as error:
        raise DataError(f"--input {name}: {error.filename}: {error.strerror}.") from None
    files, left_out, unknown = [], [], []
    for file in sorted(found):
        relative = str(file.relative_to(root))
        if _is_no_data(file):
            left_out.append(relative)
        elif kind_of(file.name) in suffixes:
            files.append(file)
        else:
            unknown.append(relative)
    if unknown:
        raise DataError(
            f"--input {name}: {_listed(unknown)}: of no kind that is read ({', '.join(suffixes)}; also .gz and .zst). "
            f"Name the files to read, or a pattern such as '{root}/**/*.jsonl'."
        )
    if not files:
        beside = f" but {_listed(left_out)}" if left_out else ""
        raise DataError(f"--input {name}: {'no data files in it' if path.is_dir() else 'no file matches'}{beside}.")
    return Found(root, files, left_out)


def kind_of(name: str) -> str:
    """The suffix that says what a file is, in lower case, without that of its compression: ``.jsonl`` of ``a.jsonl.gz``."""
    return Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part that is a pattern."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _matches(pattern: Path) -> set[Path]:
    matches = map(Path, glob.iglob(str(pattern), recursive=True))
    return {file for match in matches for file in (_files_below(match) if match.is_dir() else [match])}


def _files_below(folder: Path) -> set[Path]:
    """Every file in a folder and those below it, hidden ones apart; a link is followed, but not in a circle."""
    return set(_walk(folder, frozenset()))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, above | {real})
        else:
            yield folder / entry.name


def _is_no_data(file: Path) -> bool:
    name = file.name.lower()
    is_manifest = name.endswith(".json") and file.with_suffix(".bin").is_file() and file.with_suffix(".idx").is_file()
    return name in _NO_DATA_NAMES or name.endswith((*_NO_DATA_SUFFIXES, *_PREPARED_ENDINGS)) or is_manifest


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
