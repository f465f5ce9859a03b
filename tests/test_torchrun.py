from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

import megatron_rmipo
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.messages import rank_label, speaks_for_its_node
from megatron_rmipo.scoring import score_cli
from megatron_rmipo.torchrun import Launch, read_launch
from megatron_rmipo.training import main as trainer

WHOLE = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "node0", "MASTER_PORT": "1"}, {"RANK": "", "WORLD_SIZE": " "}])
def test_a_process_that_nobody_launched_is_alone(environment: dict[str, str]) -> None:
    assert read_launch(environment) == Launch(0, 1, 0, 1, "")


def test_the_place_is_read() -> None:
    assert read_launch(WHOLE) == Launch(3, 5, 1, 1, "node0:29500")
    assert read_launch({**WHOLE, "TORCHELASTIC_RESTART_COUNT": "2"}).restarts == 2
    assert read_launch({**WHOLE, "LOCAL_WORLD_SIZE": "2"}).local_world_size == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: None}, [f"not {name}.", "torchrun --nproc-per-node", "unset "]) for name in WHOLE),
        ({"RANK": None, "LOCAL_RANK": None, "MASTER_PORT": ""}, ["not RANK, LOCAL_RANK, MASTER_PORT.", "unset WORLD_SIZE."]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "a number from 1"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "a number from 1"]),
        ({"RANK": "5"}, ["RANK=5", "a number from 0 to 4"]),
        ({"RANK": "-1"}, ["RANK=-1", "a number from 0 to 4"]),
        ({"LOCAL_RANK": "1.0"}, ["LOCAL_RANK=1.0"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT=http", "1 to 65535"]),
        ({"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE=x"]),
    ],
)
def test_an_incomplete_or_senseless_environment_is_refused(changes: dict[str, str | None], words: list[str]) -> None:
    environment = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"WORLD_SIZE": "two"}, {**WHOLE, "LOCAL_RANK": "x"}])
@pytest.mark.parametrize("main", [trainer.main, score_cli.main])
def test_no_command_runs_alone_or_dies_of_it(
    main: object, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert not dist.is_initialized()
    assert main(["--load-hf", "nowhere"]) == 1  # type: ignore[operator]
    message = capsys.readouterr().err
    assert message.startswith("ConfigError: the environment has ")
    assert "torchrun" in message


def test_messages_name_the_rank_and_need_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert rank_label() == "[rank 3] "
    assert not speaks_for_its_node()
    monkeypatch.delenv("RANK")
    assert rank_label() == ""
    assert speaks_for_its_node()


def test_nothing_else_reads_the_place() -> None:
    package = Path(megatron_rmipo.__file__).parent
    names = re.compile(r"""["'](RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_PORT)["']\s*[,\])]""")
    readers = {path.name for path in package.rglob("*.py") if "environ" in path.read_text() and names.search(path.read_text())}
    assert readers == {"torchrun.py"}
