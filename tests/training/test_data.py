"""Whether prepared data fit what a run's objective reads of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.source import hf_source
from megatron_rmipo.errors import DataError
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.simpo import Simpo
from megatron_rmipo.training.data import RunData, open_data
from tests.integration.data import MODEL, write_pairs


class ReadsMargins(Simpo):
    """One of a user's own, which has no flag for what it reads."""

    @property
    def needs(self) -> LogpNeeds:
        return LogpNeeds(columns=("margin",))


def opened(*argv: str | Path) -> RunData:
    config = parse_arguments(["--load-hf", str(MODEL), "--seq-length", "400", *map(str, argv)])
    return open_data(config, hf_source(MODEL), objective_of(config).needs)


def test_numbers_that_are_to_be_read_are_beside_every_pair_of_the_run(tmp_path: Path) -> None:
    both = {"margin": [0.5] * 48, "weight": [1.0] * 48}
    first, second = (
        write_pairs(tmp_path / "first", values=both),
        write_pairs(tmp_path / "second", values={"weight": both["weight"]}),
    )
    bare = write_pairs(tmp_path / "bare")
    blend = ("--data-path", "0.3", first, "0.7", second)
    assert len(opened(*blend, "--objective", "simpo", "--pair-weight").train) == 160
    assert len(opened("--data-path", first, "--valid-data-path", bare, "--objective", "simpo").train) == 48

    def refused(*argv: str | Path) -> str:
        with pytest.raises(DataError) as error:
            opened(*argv)
        return str(error.value)

    told = f"--data-path {second}: no margin beside its pairs, to be read by --pair-margin. Prepare the data"
    assert told in refused(*blend, "--objective", "dpo", "--pair-margin")
    held_out = ("--data-path", first, "--valid-data-path", bare)
    assert f"--valid-data-path {bare}: no weight beside its pairs" in refused(*held_out, "--pair-weight")
    needs = ("--objective", "dpo", "--pair-margin", "--pair-beta", "--pair-weight")
    message = refused("--data-path", bare, *needs)
    assert re.search("no margin and no beta and no weight .* by --pair-margin and --pair-beta and --pair-weight", message)
    mixture = ("--objective", "dpo,simpo,sft", "--dpo-pair-margin", "--simpo-pair-margin")
    assert "no margin beside its pairs, to be read by --dpo-pair-margin and --simpo-pair-margin." in refused(
        "--data-path", bare, *mixture
    )
    own = ("--objective", "tests.training.test_data:ReadsMargins")
    assert "to be read by --objective tests.training.test_data:ReadsMargins." in refused("--data-path", bare, *own)
