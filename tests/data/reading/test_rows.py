from __future__ import annotations

from megatron_rmipo.data.reading.rows import Turn, answer, excerpt
from tests.data.pairs import pair_of


def test_what_belongs_to_the_responses_finds_its_place() -> None:
    pair = pair_of((Turn("user", "Why?"),), "a", "b")
    assert pair.responses == {"chosen": answer("a"), "rejected": answer("b")}
    assert pair.in_place([1, 2]) == (1, 2)
    assert pair._replace(rejected=None).responses == {"response": answer("a")}
    assert pair._replace(rejected=None).in_place([1]) == (1, None)
    assert pair._replace(chosen=None).responses == {"response": answer("b")}
    assert pair._replace(chosen=None).in_place([2]) == (None, 2)


def test_an_excerpt_is_short_whatever_the_row() -> None:
    assert len(excerpt({"a": "x" * 1000})) == 400
    assert excerpt("{bad json") == "{bad json"
