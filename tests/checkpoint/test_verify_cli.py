"""The tool that compares a converted model with transformers, over ranks it starts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.checkpoint import verify_cli
from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron
from tests.checkpoint.models import write_hf_model


@pytest.mark.dist
@pytest.mark.slow
def test_experts_over_ranks_agree_and_a_model_of_other_weights_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen3_moe")
    over_ranks = ["--hf-model", str(hf), "--expert-model-parallel-size", "2"]
    assert verify_cli.main(over_ranks) == 0
    assert "(TP 1, PP 1, EP 2, float32), 192 tokens" in capsys.readouterr().out
    interleaved = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    assert verify_cli.main(["--hf-model", str(hf), *interleaved]) == 0
    assert "(TP 1, PP 2, --num-virtual-stages-per-pipeline-rank 2, float32)" in capsys.readouterr().out
    convert_hf_to_megatron(write_hf_model(tmp_path / "other", "qwen3_moe", seed=8), tmp_path / "checkpoints")
    assert verify_cli.main(["--hf-model", str(hf), "--load", str(tmp_path / "checkpoints")]) == 1
    assert "more than --tolerance 0.0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-model-parallel-size", "4"], "does not divide the model's 10 experts. Use one of 1, 2, 5, 10."),
        (["--tensor-model-parallel-size", "4"], "2 key/value heads and 88 and 28 feed-forward channels. Use one of 1, 2."),
        (["--pipeline-model-parallel-size", "3"], "4 layers do not come out even over 3 stages; would work: "),
        (["--num-virtual-stages-per-pipeline-rank", "2"], "there is one pipeline stage"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen3_moe")
    assert verify_cli.main(["--hf-model", str(hf), *flags]) == 1
    assert message in capsys.readouterr().err


def test_latents_that_ranks_cannot_share_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = write_hf_model(tmp_path / "hf", "deepseek_v2", kv_lora_rank=13)
    assert verify_cli.main(["--hf-model", str(hf), "--tensor-model-parallel-size", "2"]) == 1
    assert "does not divide the model's latents of 19 channels, which" in (message := capsys.readouterr().err)
    assert "would work: 1." in message
