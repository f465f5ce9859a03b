"""Files that are there whole, or as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rmipo.whole_files import replace_file


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    replace_file(path, ["one\n", "two\n"])
    assert path.read_text() == "one\ntwo\n"

    def failing() -> Iterator[str]:
        yield "three\n"
        assert path.read_text() == "one\ntwo\n"
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, failing())
    assert path.read_text() == "one\ntwo\n"
    # It may be made of itself.
    with path.open() as lines:
        replace_file(path, (line.upper() for line in lines))
    assert path.read_text() == "ONE\nTWO\n"
    assert list(path.parent.iterdir()) == [path]
