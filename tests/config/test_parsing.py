import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest
import yaml

from megatron_rmipo.config.parsing import parse_config
from megatron_rmipo.config.schema import Config, LoggingConfig
from megatron_rmipo.config.values import convert, field_types
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.registry import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class FlatOptions:
    beta: float = dataclasses.field(default=2.0, metadata={"help": "Scale, in %."})
    shape: Literal["round", "square"] = "round"
    normalize: bool = True


@dataclasses.dataclass(frozen=True)
class SharpOptions:
    sharpness: int = 3

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(f"sharpness {self.sharpness} is below 0")


TWO_OBJECTIVES = {"flat": FlatOptions, "sharp": SharpOptions}


def unknown(name: str) -> type:
    raise ValueError(f"{name} is neither flat nor sharp")


def parse(*argv: str) -> Config:
    return parse_config(["--objective", "flat", *argv], TWO_OBJECTIVES, unknown)


def fault(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return str(caught.value)


def test_flags_reach_their_fields_in_both_spellings() -> None:
    config = parse(
        "--tensor_model_parallel_size", "2", "--lr=3e-7", "--data-path", "0.7", "A", "0.3", "B", "--bf16", "--no-load-optim"
    )
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.optimizer.lr == 3e-7
    assert config.data.data_path == ["0.7", "A", "0.3", "B"]
    assert config.model.bf16
    assert config.checkpoint.no_load_optim
    assert parse("--no-share-prompts").model.share_prompts is False


def test_an_underscore_in_a_value_stays() -> None:
    assert parse("--load_hf=my_model", "--save", "out_dir").model.load_hf == "my_model"


def test_negative_numbers_are_values() -> None:
    assert parse("--beta", "-1e-3").objective.options["beta"] == -1e-3


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 6e-5\nglobal-batch-size: 7\ndata_path: [0.25, A, 0.75, B]\nbeta: 5\n")
    config = parse("--config", str(file), "--global-batch-size", "9")
    assert config.optimizer.lr == 6e-5
    assert config.training.global_batch_size == 9
    assert config.data.data_path == ["0.25", "A", "0.75", "B"]
    assert config.objective.options == {"beta": 5.0, "shape": "round", "normalize": True}
    assert config.optimizer.adam_beta2 == 0.999


def test_the_objective_may_be_named_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("objective: sharp\nsharpness: 5\n")
    config = parse_config(["--config", str(file)], TWO_OBJECTIVES, unknown)
    assert (config.objective.objective, config.objective.options) == ("sharp", {"sharpness": 5})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tensor-model-paralel-size", "2"], ["--tensor-model-paralel-size", "did you mean --tensor-model-parallel-size?"]),
        (["--no-shared-prompts"], ["--no-shared-prompts", "did you mean --share-prompts?"]),
        (["--micro-batch-size", "4"], ["--micro-batch-size", "--tokens-per-microbatch"]),
        (["--lr", "fast"], ["--lr", "expected a number", "'fast'"]),
        (["--lr", "nan"], ["--lr", "expected a number", "'nan'"]),
        (["--lr", "6e"], ["--lr", "expected a number", "'6e'"]),
        (["--seq-length", "2k"], ["--seq-length", "expected a whole number", "'2k'"]),
        (["--save", ""], ["--save", "expected a text", "''"]),
        (["--bf16", "True"], ["--bf16 True: --bf16 is a switch", "--no-bf16 for off"]),
        (["--no_bf16=1"], ["--no-bf16 1: --no-bf16 is a switch", "leave it out for off"]),
        (["--finetune=False", "--lr", "fast", "--learning-rate", "1"], ["--finetune False: --finetune is a switch", "use --lr"]),
        (["--no-lr"], ["--no-lr: --lr takes a value and is no switch"]),
        (["--load-rng"], ["--load-rng: that is the default; --no-load-rng turns it off"]),
        (["--global-batch-size", "2.5"], ["--global-batch-size", "a whole number", "'2.5'"]),
        (["--attention-backend", "fast"], ["--attention-backend", "auto, sdpa, flex", "'fast'"]),
        (["--shape", "oval"], ["--shape", "round, square", "'oval'"]),
        (["--sharpness", "4"], ["--sharpness", "--objective flat", "sharp", "--beta, --shape, --normalize"]),
        (["--objective", "flatt"], ["--objective: flatt is neither flat nor sharp"]),
        (["--objective", "sharp", "--sharpness", "-4"], ["--objective sharp", "sharpness -4 is below 0"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["stray"], ["'stray' belongs to no flag"]),
    ],
)
def test_faults_on_the_command_line_are_named(argv: list[str], words: list[str]) -> None:
    message = fault(*argv)
    assert all(word in message for word in words), message


def test_a_flag_that_is_given_again_is_told_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    again = ("--lr", "1e-6", "--bf16", "--data-path", "A", "B", "--lr=2e-6", "--lr", "3e-6", "--no-bf16", "--data-path", "C")
    config = parse(*again, "--seed", "5", "--seed", "5")
    assert (config.optimizer.lr, config.model.bf16, config.data.data_path) == (3e-6, False, ["C"])
    told = capsys.readouterr().err
    assert "--lr is given more than once (1e-6, then 2e-6, then 3e-6); the last one counts" in told
    assert "--bf16 is given more than once (True, then False)" in told
    assert "--data-path is given more than once (A B, then C)" in told
    # Neither the same value twice, nor by every rank.
    assert "--seed" not in told
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    parse(*again)
    assert capsys.readouterr().err == ""


def test_all_faults_are_listed_at_once() -> None:
    message = fault("--lr", "fast", "--seed", "x", "--shape", "oval")
    assert all(word in message for word in ("--lr", "--seed", "--shape"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1e-5\nlrr: 3\n", ["run.yaml:2", "lrr", "did you mean --lr?"]),
        ("lr: 1e-5\n\nlr: 3\n", ["run.yaml:3", "twice", "run.yaml:1"]),
        ("global_batch_size: many\n", ["run.yaml:1", "global_batch_size", "whole number", "'many'"]),
        ("seed: true\n", ["run.yaml:1", "seed", "whole number", "True"]),
        ("save: 3\n", ["run.yaml:1", "save", "a text", "3"]),
        ("bf16: maybe\n", ["run.yaml:1", "bf16", "true or false", "'maybe'"]),
        ("training:\n  lr: 1\n", ["run.yaml:1", "flat", "training"]),
        ("sharpness: 2\n", ["run.yaml:1", "sharpness", "--objective flat", "sharp"]),
        ("- a\n", ["run.yaml", "flag_name: value"]),
        ("lr: [\n", ["run.yaml", "not valid YAML"]),
        ("lr:\n", ["run.yaml:1", "lr", "found nothing"]),
        ("save: ''\n", ["run.yaml:1", "save", "a text"]),
        ("no_bf16: true\n", ["run.yaml:1", "no_bf16", "set bf16: false"]),
        ("micro_batch_size: 2\n", ["run.yaml:1", "--global-batch-size"]),
    ],
)
def test_faults_in_the_file_are_named_with_their_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = fault("--config", str(file))
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.yaml" in fault("--config", str(tmp_path / "absent.yaml"))


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = parse("--lr", "3e-7", "--data-path", "A", "--no-share-prompts", "--beta", "3", "--save", "out", "--no-save-optim")
    config.save_config(tmp_path / "new" / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "new" / "config.yaml")], TWO_OBJECTIVES, unknown) == config
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["beta"] == 3.0


RMIPO_GAP = ["--objective", "rmipo", "--margin-signal", "gap", "--margin-scale", "beta_gamma"]


@pytest.mark.parametrize("argv", [*(["--objective", name] for name in sorted(OBJECTIVES)), RMIPO_GAP], ids=" ".join)
def test_a_saved_configuration_of_every_objective_reads_back(tmp_path: Path, argv: list[str]) -> None:
    config = parse_arguments(argv)
    config.save_config(tmp_path / "config.yaml")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_configuration_that_cannot_be_saved_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="file"):
        parse().save_config(tmp_path / "file" / "config.yaml")


def test_an_objective_from_elsewhere_brings_its_options() -> None:
    def load(name: str) -> type:
        assert name == "my.module:Mine"
        return SharpOptions

    config = parse_config(["--objective", "my.module:Mine", "--sharpness", "8"], {"flat": FlatOptions}, load)
    assert config.objective.options == {"sharpness": 8}
    with pytest.raises(ConfigError, match=r"my\.module:Mine"):
        parse_config(["--objective", "my.module:Mine", "--beta", "1"], {"flat": FlatOptions}, load)


def test_an_objective_that_cannot_be_imported_is_a_typed_error() -> None:
    with pytest.raises(ConfigError, match="no_such_module_anywhere"):
        parse_arguments(["--objective", "no_such_module_anywhere:Loss"])
    with pytest.raises(ConfigError, match=r"^--objective: unknown objective 'simpoo'; did you mean 'simpo'\?"):
        parse_arguments(["--objective", "simpoo"])


def test_an_option_may_not_take_a_flag_of_the_trainer() -> None:
    @dataclasses.dataclass(frozen=True)
    class Greedy:
        seed: int = 0

    with pytest.raises(ConfigError, match=r"greedy.*seed"):
        parse_config(["--objective", "greedy"], {"greedy": Greedy}, unknown)


def test_help_names_every_flag_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    names = set(Config().to_flat_dict()) | {name for objective in OBJECTIVES.values() for name in field_types(objective.Config)}
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in text]
    assert not missing
    assert "Parallelism" in text
    assert "in %" not in text


def test_every_flag_has_a_help_text_of_its_own() -> None:
    texts = [
        field.metadata["help"]
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(Config(), section.name))
        if field.metadata.get("flag", True)
    ]
    assert all(len(text) > 15 and text.endswith(".") for text in texts)
    assert len(set(texts)) == len(texts)


def test_log_directory_follows_save(tmp_path: Path) -> None:
    assert parse("--save", str(tmp_path)).log_directory == tmp_path / "logs"
    assert parse("--save", str(tmp_path), "--log-dir", "elsewhere").log_directory == Path("elsewhere")


def test_values_are_never_rounded_and_bools_are_no_numbers() -> None:
    kinds = field_types(LoggingConfig)
    assert convert("12", kinds["log_interval"]) == 12
    for raw in (1.0, True, "1.0", "inf", [1]):
        with pytest.raises(ValueError, match="whole number"):
            convert(raw, kinds["log_interval"])
    with pytest.raises(ValueError, match="a number"):
        convert(math.inf, field_types(FlatOptions)["beta"])


def test_the_whole_configuration_is_printed_with_its_sources_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("objective: dpo\n\nbeta: 0.2\nwandb_exp_name: 'a # b'\n")
    argv = ["--config", str(path), "--lr", "1e-6", "--data-path", "0.3", "a", "0.7", "b"]
    with pytest.raises(SystemExit) as end:
        parse_arguments([*argv, "--print-config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    lines = {line.partition(":")[0]: line for line in printed.splitlines()}
    sources = {
        "beta": f"{path}:3: beta",
        "lr": "--lr",
        "seed": "default",
        "label_smoothing": "default of --objective dpo",
        "data_path": "--data-path",
    }
    assert {name: lines[name].rpartition("# ")[2] for name in sources} == sources
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert parse_arguments(["--config", str(again)]) == parse_arguments(argv)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        parse_arguments([*argv, "--print-config"])
    assert capsys.readouterr().out == ""
