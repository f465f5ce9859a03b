"""Megatron-Bridge's own adapters, where the package is: scored exactly, off as the reference, and their checkpoints to PEFT."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

import megatron_rmipo.plugin as plugin
from megatron_rmipo.checkpoint.convert import convert_megatron_to_hf
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, run_at_layouts
from tests.plugin.adapters.bridge_on_cpu import WITHOUT_KERNELS, bridge_is_installed, import_bridge
from tests.plugin.adapters.first_step import EVEN_VOCAB
from tests.plugin.bridge_adapters import ALPHA, DIM, KINDS, fill_adapters, write_adapted

pytestmark = [
    pytest.mark.skipif(
        not bridge_is_installed(), reason="needs Megatron-Bridge itself (0.6.2, Python 3.12), which is not installed"
    ),
    pytest.mark.slow,
    pytest.mark.dist,
]
LAYOUTS = {
    1: [Case("alone")],
    2: [Case("TP 2", tp=2), Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2)],
}
FEW: dict[str, Any] = {"tokens_per_microbatch": 60}
# Of its configuration, what the converter reads of its ``run_config.yaml``.
CLASSES = {"LoRA": "lora.LoRA", "CanonicalLoRA": "canonical_lora.CanonicalLoRA", "DoRA": "dora.DoRA"}


def adapted_model(case: Case, hf_dir: Path, groups: ProcessGroups, kind: str) -> tuple[Any, Any, Any]:
    """The package's bridge, its model with adapters, and its ``PEFT``."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    bridge = AutoBridge.from_hf_pretrained(str(hf_dir))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings = {
        **WITHOUT_KERNELS,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "sequence_parallel": case.sequence_parallel,
        "variable_seq_lengths": case.pp > 1,
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "should_pad_vocab": False,
        "calculate_per_token_loss": True,
    }
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    models = provider.provide_distributed_model(
        wrap_with_ddp=False,
        mixed_precision_wrapper=None,
        use_cpu_initialization=True,
        pg_collection=groups.megatron_collection(),
    )
    peft = {"LoRA": LoRA, "CanonicalLoRA": CanonicalLoRA, "DoRA": DoRA}[kind](dim=DIM, alpha=int(ALPHA))
    models = peft(models, training=True)
    peft.set_params_to_save(models)
    assert fill_adapters(models[0], read_architecture(hf_dir), groups) > 0
    return bridge, models, peft


def save_checkpoint(models: Any, peft: Any, directory: Path, case: Case, kind: str) -> None:
    """As its checkpoints hold an adapter."""
    from megatron.bridge.training.checkpointing import _generate_model_state_dict, apply_peft_adapter_filter_to_state_dict
    from megatron.core import dist_checkpointing

    path = directory / "iter_0000003"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        said = {"peft": {"_target_": f"megatron.bridge.peft.{CLASSES[kind]}", "alpha": int(ALPHA)}}
        (path / "run_config.yaml").write_text(yaml.safe_dump(said | {"model": {"tensor_model_parallel_size": case.tp}}))
        (directory / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    dist_checkpointing.save(apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(models), peft), str(path))


def scored(cases: list[Case], folder: str, kind: str) -> list[Any]:
    """Of each case log-probs with and without the adapters, those of the reference, or what was refused."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from megatron_rmipo.runtime.cpu import install_cpu_runtime

    install_cpu_runtime()
    import_bridge()

    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> Any:
        bridge, models, peft = adapted_model(case, Path(folder) / "model", groups, kind)
        try:
            plugin.attach(models[0], vocab_size=EVEN_VOCAB)
        except ConfigError as error:
            return str(error)
        rows = [(p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()) for p in pairs]
        found = {"on": plugin.score(models[0], rows, **FEW).logps}
        with plugin.adapters_off(models[0]):
            found["off"] = plugin.score(models[0], rows, **FEW).logps
        kept = collection(pairs)
        plugin.score_reference(models[0], kept, build_objective("dpo", {}), **FEW)
        found |= {"reference": kept.scores_of(np.arange(len(pairs))), "again": plugin.score(models[0], rows, **FEW).logps}
        save_checkpoint(models, peft, Path(folder) / case.name, case, kind)
        bridge.save_hf_adapter(models, Path(folder) / case.name / "its_own", peft_config=peft, show_progress=False)
        return found

    return run_at_layouts(compute, cases, folder, make_pairs())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_its_adapters_are_scored_switched_off_and_converted(world_size: int, kind: str, tmp_path: Path) -> None:
    base = make_hf_model(tmp_path / "model", vocab_size=EVEN_VOCAB, layers=2)
    problem = DenseProblem(write_adapted(base, tmp_path / "adapted", kind), base, make_pairs())
    on = problem.conditional.detach().numpy()
    with torch.no_grad():
        off = problem._table(problem.reference, problem.pairs).numpy()
    cases = LAYOUTS[world_size]
    for results in run_distributed(scored, world_size, cases, str(tmp_path), kind):
        for case, found in zip(cases, results, strict=True):
            if kind == "DoRA" and case.tp > 1:
                assert "a DoRALinear takes the lengths of rows from each rank's own" in found
                continue
            for name, dense in (("on", on), ("off", off), ("reference", off), ("again", on)):
                np.testing.assert_allclose(found[name], dense, rtol=1e-5, atol=2e-5, err_msg=f"{case.name}, {name}")
    for case in cases:
        if kind == "DoRA" and case.tp > 1:
            continue
        run = tmp_path / case.name
        convert_megatron_to_hf(run, run / "ours", assets_dir=base)
        ours, own = (load_file(run / name / "adapter_model.safetensors") for name in ("ours", "its_own"))
        # Its export leaves the lengths out.
        assert ours.keys() - own.keys() == {name for name in ours if "magnitude" in name}
        assert own.keys() <= ours.keys()
        assert all(torch.equal(ours[name], one) for name, one in own.items())
        shutil.rmtree(run)
