"""Addresses of object stores in the place of paths: the same word everywhere, before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.remote_paths import flags_and_values, refuse_remote_paths
from tests.examples.scripts import LLAMA, ROOT, calls, environment, run_script

SAID = "object stores are neither read nor written. Copy it to a file system that all nodes see"


@pytest.mark.parametrize(
    ("line", "named", "remedy"),
    [
        ("--load-hf s3://bucket/model", "--load-hf s3://bucket/model: ", "aws s3 cp --recursive s3://bucket/model DIR"),
        ("--save=gs://b/run", "--save gs://b/run: ", "gcloud storage cp --recursive gs://b/run DIR"),
        ("--data-path 0.7 here/a 0.3 s3://b/pairs", "--data-path s3://b/pairs: ", "aws s3"),
        ("--load-hf hf://meta-llama/Llama-3.1-8B", "--load-hf hf://", "hf download meta-llama/Llama-3.1-8B --local-dir DIR"),
        ("--input=data=hf://datasets/o/n", "--input data=hf://datasets/o/n: ", "hf download o/n"),
        ("HF_MODEL=abfs://c@a/m", "HF_MODEL=abfs://c@a/m: ", "azcopy"),
    ],
)
def test_the_flag_the_value_and_what_copies_it_are_named(line: str, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as told:
        refuse_remote_paths(flags_and_values(line.split()))
    assert str(told.value).startswith(named)
    assert SAID in str(told.value)
    assert remedy in str(told.value)


def test_what_is_no_address_of_a_store_passes() -> None:
    line = "--load-hf /models/s3 --input owner/name file:///x --rdzv-endpoint tcp://node0:1 --wandb-exp-name a://b"
    refuse_remote_paths(flags_and_values(line.split()))


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_says_it_before_it_imports_anything(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--load", "s3://bucket/x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --load s3://bucket/x: object stores")
    assert len(result.stderr.splitlines()) == 1


def test_a_file_of_flags_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("load_hf: s3://bucket/model\ndata_path: [gs://b/pairs]\n")
    with pytest.raises(ConfigError) as told:
        parse_arguments(["--config", str(tmp_path / "flags.yaml")])
    assert str(told.value).count(SAID) == 2
    assert "load_hf" in str(told.value)


def test_the_scripts_say_it_of_their_variables(tmp_path: Path) -> None:
    message = run_script(LLAMA, environment(tmp_path, HF_MODEL="s3://b/model", DATA="pairs.jsonl"), expect=1)
    assert "HF_MODEL=s3://b/model: object stores" in message
    assert calls(tmp_path) == []
