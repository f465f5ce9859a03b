"""Checkpoints between this package and Megatron-LM: its own loader takes ours, and ours takes what its saver wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.megatron_lm_args import beyond_megatron_lm
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.checkpoint.verify import Agreement, compare_with_transformers
from megatron_rmipo.checkpoint.verify_checkpoint_cli import main as verify_checkpoint
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.checkpoint.models import KINDS, write_hf_model
from tests.harness import run_distributed

pytest.importorskip("megatron.training", reason="Megatron-LM's own loop is in megatron-core from 0.19 on, for Python 3.12")
pytestmark = [pytest.mark.dist, pytest.mark.slow]

# The one scaling that Megatron-LM's flag stands for.
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
CHANGES: dict[str, dict[str, Any]] = {"llama31": {"rope_parameters": LLAMA3}, "llama32_tied": {"rope_parameters": LLAMA3}}
# Its local layers cannot compute latent attention; Transformer Engine's can, on a GPU.
NOT_HERE = {"deepseek_v2"}


def differences(folder: Path) -> dict[str, float]:
    """Of logits, by kind: what Megatron-LM computes of a converted model, against transformers."""
    from tests.checkpoint import megatron_lm

    initialize_runtime(1, 1)
    found = {}
    for kind in KINDS:
        hf = write_hf_model(folder / kind, kind, **CHANGES.get(kind, {}))
        arch = read_architecture(hf)
        if kind in NOT_HERE or list(beyond_megatron_lm(arch)):
            continue
        convert_hf_to_megatron(hf, folder / f"{kind}-megatron")
        model = megatron_lm.build_model(megatron_lm.arguments_of(folder / f"{kind}-megatron"))
        assert megatron_lm.load(model) == 0
        token_ids = torch.randint(arch.vocab_size, (41,), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(hf).eval()(token_ids[None]).logits[0]
        found[kind] = float((megatron_lm.logits_of(model, token_ids)[:, : arch.vocab_size] - expected).abs().max())
    shutdown_runtime()
    return found


def test_megatron_lm_computes_what_its_arguments_can_say(tmp_path: Path) -> None:
    found = run_distributed(differences, 1, tmp_path)[0]
    assert len(found) > 15
    assert {kind: difference for kind, difference in found.items() if difference > 1e-4} == {}


def there_and_back(hf: Path, folder: Path, sizes: tuple[int, int, int]) -> Agreement:
    """A checkpoint of ours, saved at a layout, loaded by Megatron-LM there, saved by it with an optimizer, and loaded here."""
    from megatron.training import checkpointing

    from tests.checkpoint import megatron_lm

    tp, pp, ep = sizes
    groups = initialize_runtime(tp, pp, expert_model_parallel_size=ep)
    arch = read_architecture(hf)
    policy = build_policy(arch, transformer_config(arch, groups), groups)
    load_hf_weights(policy, hf, arch, groups=groups)
    stored: dict[str, Any] = {"optimizer": None, "scheduler": None, "train_state": {"consumed_pairs": 35}, "config": {}}
    save_checkpoint(folder / "ours", 5, model=policy, assets_dir=hf, groups=groups, **stored)

    theirs = folder / "theirs"
    flags = ["--no-load-optim", "--use-distributed-optimizer", "--use-mp-args-from-checkpoint-args", "--save"]
    args = megatron_lm.arguments_of(folder / "ours", *flags, str(theirs))
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tp, pp)
    model = megatron_lm.build_model(args)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    assert megatron_lm.load(model, optimizer) == 5
    assert args.consumed_train_samples == 35
    # The master weights are not of the configuration's dtype alone, but of what was loaded.
    optimizer.reload_model_params()
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.5)
    optimizer.step()
    args.consumed_train_samples = 42
    checkpointing.save_checkpoint(6, [model], optimizer, None, 0)
    groups.world.barrier().wait()

    again = build_policy(arch, transformer_config(arch, groups), groups)
    # It carries no Hugging Face config, which loading alone does not need.
    assert load_checkpoint(theirs, model=again, optimizer=None, scheduler=None, load_rng=True, groups=groups) == {}
    if groups.rank == 0:
        convert_megatron_to_hf(theirs, folder / "trained", assets_dir=hf)
    groups.world.barrier().wait()
    texts = [torch.randint(arch.vocab_size, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 40)]
    agreement = compare_with_transformers(again, folder / "trained", texts, groups, torch.float32)
    shutdown_runtime()
    return agreement


@pytest.mark.parametrize(("kind", "sizes"), [("qwen3", (1, 1, 1)), ("llama2", (2, 1, 1)), ("qwen3_moe", (1, 2, 1))])
def test_a_model_goes_to_megatron_lm_trains_there_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, sizes: tuple[int, int, int]
) -> None:
    hf = write_hf_model(tmp_path / "hf", kind)
    for agreement in run_distributed(there_and_back, math.prod(sizes), hf, tmp_path, sizes):
        assert agreement.max_difference < 1e-4
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "trained"))
    # Adam's first step is one of the learning rate, whatever the gradient.
    moved = {name: float((after[name] - tensor).abs().mean()) for name, tensor in before.items()}
    assert before.keys() == after.keys()
    assert {name: by for name, by in moved.items() if not math.isclose(by, 0.01, rel_tol=0.02)} == {}
    assert verify_checkpoint([str(tmp_path / "theirs")]) == 0
    assert "iter_0000006: complete, readable" in capsys.readouterr().out
