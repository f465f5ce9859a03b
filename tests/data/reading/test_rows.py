from __future__ import annotations

import pytest

from megatron_rmipo.data.reading.rows import Turn, answer, excerpt, parse_columns, rename_columns
from megatron_rmipo.errors import DataError
from tests.data.pairs import pair_of


def test_what_belongs_to_the_responses_finds_its_place() -> None:
    pair = pair_of((Turn("user", "Why?"),), "a", "b")
    assert pair.responses == {"chosen": answer("a"), "rejected": answer("b")}
    assert pair.in_place([1, 2]) == (1, 2)
    assert pair._replace(rejected=None).responses == {"response": answer("a")}
    assert pair._replace(rejected=None).in_place([1]) == (1, None)
    assert pair._replace(chosen=None).responses == {"response": answer("b")}
    assert pair._replace(chosen=None).in_place([2]) == (None, 2)


def test_columns_are_renamed_and_may_be_nested() -> None:
    columns = parse_columns("prompt=q, chosen=answers.good,rejected=answers.bad")
    row = rename_columns({"q": "Why?", "answers": {"good": "g", "bad": "b"}, "chosen": "stale"}, columns)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Why?", "g", "b")
    assert "chosen" not in rename_columns({"chosen": "stale"}, {"chosen": "absent"})


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=x", "promt=x", "prompt=a,prompt=b"])
def test_a_wrong_columns_flag_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="--columns"):
        parse_columns(text)


def test_an_excerpt_is_short_whatever_the_row() -> None:
    assert len(excerpt({"a": "x" * 1000})) == 400
    assert excerpt("{bad json") == "{bad json"
