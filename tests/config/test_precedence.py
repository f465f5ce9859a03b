"""A run's own configuration as the start of the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rmipo.config.flag_problems import config_problems
from megatron_rmipo.config.schema import Config, OptimizerConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.registry import OBJECTIVES

BASE = ("--data-path", "A", "--load-hf", "M")


def next_run(tmp_path: Path, before: tuple[str, ...], *argv: str) -> Config:
    file = tmp_path / "config.yaml"
    parse_arguments([*BASE, *before]).save_config(file)
    return parse_arguments(["--config", str(file), *argv])


# Every pair of flags that exclude each other, with values, and where they are found.
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("--train-iters", "7"), ("--epochs", "2.0")),
        (("--split", "99,1"), ("--valid-data-path", "B")),
        (("--lr-warmup-fraction", "0.1"), ("--lr-warmup-iters", "3")),
        (("--reference-hf", "R"), ("--reference-load", "C")),
    ],
    ids=lambda flag: flag[0],
)
def test_a_flag_on_the_command_line_beats_the_one_of_the_file_that_it_excludes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: tuple[str, str], second: tuple[str, str]
) -> None:
    for file, line in ((first, second), (second, first)):
        assert next_run(tmp_path, file, *line) == parse_arguments([*BASE, *line])
        told = capsys.readouterr().err
        key = file[0].removeprefix("--").replace("-", "_")
        assert told.count("note: ") == 1
        assert f": {key} gives way to {line[0]}" in told
        # Both at one place contradict each other still.
        both = next_run(tmp_path, file, *file, *line)
        assert any(f"{file[0]} {file[1]}" in problem and "give one of them" in problem for problem in config_problems(both))
    assert next_run(tmp_path, first) == parse_arguments([*BASE, *first])
    assert capsys.readouterr().err == ""


def test_another_objective_starts_from_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ("--objective", "rmipo", "--beta", "3", "--gamma-max", "1.4", "--lr", "3e-7")
    config = next_run(tmp_path, before, "--objective", "dpo", "--label-smoothing", "0.1")
    # Not rmipo's beta either: it is of another scale.
    assert config == parse_arguments([*BASE, "--lr", "3e-7", "--objective", "dpo", "--label-smoothing", "0.1"])
    told = capsys.readouterr().err
    assert told.count("note: ") == 1
    assert ": objective rmipo gives way to --objective dpo, and with it " in told
    assert all(f", {key}" in told for key in ("beta", "gamma_min", "gamma_max"))
    # The same one goes on as it was.
    assert next_run(tmp_path, before, "--objective", "rmipo").objective.options["gamma_max"] == 1.4
    assert capsys.readouterr().err == ""


def test_the_learning_rate_is_the_objectives_own_unless_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse_arguments([*BASE, "--objective", name]).optimizer.lr for name in ("sft", "dpo")] == [2e-5, 6e-7]
    assert parse_arguments([*BASE, "--objective", "sft", "--lr", "3e-6"]).optimizer.lr == 3e-6
    file = tmp_path / "run.yaml"
    file.write_text("objective: sft\nlr: 4e-6\n")
    assert parse_arguments(["--config", str(file)]).optimizer.lr == 4e-6
    # A saved run holds it; another objective takes it over where it was chosen, and not where it was that objective's own.
    assert next_run(tmp_path, ("--objective", "sft")).optimizer.lr == 2e-5
    assert next_run(tmp_path, ("--objective", "sft", "--lr", "4e-6"), "--objective", "dpo").optimizer.lr == 4e-6
    capsys.readouterr()
    assert next_run(tmp_path, ("--objective", "sft"), "--objective", "dpo").optimizer.lr == 6e-7
    assert ": objective sft gives way to --objective dpo, and with it lr\n" in capsys.readouterr().err
    assert next_run(tmp_path, ("--objective", "dpo"), "--objective", "sft").optimizer.lr == 2e-5


def test_the_help_names_every_learning_rate_that_an_objective_brings() -> None:
    text = next(field.metadata["help"] for field in dataclasses.fields(OptimizerConfig) if field.name == "lr")
    usual = Config().optimizer.lr
    for name, objective in OBJECTIVES.items():
        told = f"{name} {objective.default_lr:.0e}".replace("e-0", "e-") in text
        assert told == (objective.default_lr != usual), name


def test_options_of_neither_objective_are_faults_still(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("objective: rmipo\nbeta: 3\nmargin_schedul: cosine\n")
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", str(file), "--objective", "dpo"])
    assert f"{file}:3: margin_schedul" in str(caught.value)


def test_entries_of_another_version_are_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    parse_arguments(BASE).save_config(file)
    lines = len(file.read_text().splitlines())
    file.write_text(file.read_text() + "use_torch_fsdp2: true\nwarp_factor: 9\n")
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", str(file)])
    message = str(caught.value)
    assert f"{file}:{lines + 1}: use_torch_fsdp2: not a flag here" in message
    assert f"{file}:{lines + 2}: warp_factor: unknown flag" in message
    assert message.count("or remove the line, if another version wrote the file") == 2
