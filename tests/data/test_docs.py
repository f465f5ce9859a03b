"""docs/data.md names what a user can write or read: layouts, columns, roles, fields of messages, reasons, files."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_rmipo.data.layouts import messages
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.preparing.preprocess_cli import build_parser
from megatron_rmipo.data.reading.rows import COLUMN_NAMES, REASONS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


@pytest.mark.parametrize(
    "names",
    [REASONS, FORMATS, COLUMN_NAMES, messages.ROLES, messages._CALL_ROLES | messages._BOOKKEEPING | messages._LEARNED_MARKS],
)
def test_the_page_has_every_name(names: Iterable[str]) -> None:
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_the_page_has_every_flag() -> None:
    flags = [action.option_strings[-1] for action in build_parser()._actions if action.option_strings]
    shown_by_help = {"--help", "--debug", "--log-interval"}
    assert [flag for flag in flags if flag not in PAGE and flag not in shown_by_help] == []
