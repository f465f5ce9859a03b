"""The scripts of other models train their embedded defaults, small models of their own shapes, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Script -> architecture of what it trains.
SHAPES = {
    "run_rmipo_qwen3_8b.sh": "Qwen3ForCausalLM",
    "run_rmipo_gemma3_12b.sh": "Gemma3ForCausalLM",
    "run_rmipo_llama3_70b.sh": "LlamaForCausalLM",
    "run_rmipo_qwen3_30b_a3b.sh": "Qwen3MoeForCausalLM",
}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("script", SHAPES)
def test_two_steps_on_two_ranks(script: str, tmp_path: Path) -> None:
    environment = {
        # The interpreter of these tests, as an activated environment would have it.
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS_PER_NODE": "2",
        "EMBEDDED_FLAGS": "--sft-rows 1 --train-pairs 24 --heldout-pairs 4", "GLOBAL_BATCH_SIZE": "8", "SFT_DATA": "",
        "STEPS": "2", "EVAL_INTERVAL": "0", "WORK_DIR": str(tmp_path / "work"),
    }  # fmt: skip
    for variable in ("HF_MODEL", "DATA", "TP", "PP", "EP"):
        environment.pop(variable, None)
    command = ["bash", str(ROOT / "examples" / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "work" / "rmipo" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in lines) == 2
    config = json.loads((tmp_path / "work" / "hf" / "config.json").read_text())
    assert config["architectures"] == [SHAPES[script]]
