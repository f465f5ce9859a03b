import pytest

from megatron_rmipo.config.flags.data import parse_blend, parse_split
from megatron_rmipo.errors import ConfigError


def test_blend_weights_are_scaled() -> None:
    assert parse_blend(["A"]) == [(1.0, "A")]
    assert parse_blend(["3", "A", "1", "B"]) == [(0.75, "A"), (0.25, "B")]
    for values in (
        [],
        ["A", "B"],
        ["1", "A", "2"],
        ["0", "A", "1", "B"],
        ["nan", "A", "1", "B"],
        ["1e308", "A"] * 2,
        ["1e-300", "A", "1e300", "B"],
    ):
        with pytest.raises(ConfigError, match="--data-path"):
            parse_blend(values)


def test_split_gives_shares() -> None:
    assert parse_split("99,1") == (0.99, 0.01)
    assert parse_split("1.5,0.5") == (0.75, 0.25)
    for split in ("99", "98,1,1", "a,b", "0,1", "-1,2"):
        with pytest.raises(ConfigError, match="--split"):
            parse_split(split)
