"""What one rank does in tests of the adapter over the stand-in: a plain GPTModel in DDP, attached by the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.integration.worlds import Case, run_at_layouts
from tests.plugin.adapters.first_step import FirstStep
from tests.plugin.adapters.stand_in_finetune import configuration, finetune, install_stand_in
from tests.plugin.foreign import build_llama


def prepare(case: Case, folder: Path, groups: ProcessGroups, **train: Any) -> tuple[Any, list[Any]]:
    """Configuration and model for a case."""
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceData, use_preferences

    arch = read_architecture(folder / "model")
    inner = build_llama(arch, groups, sequence_parallel=case.sequence_parallel)
    load_hf_weights(inner, folder / "model", arch, groups=groups)
    inner.config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
    data = PreferenceData(objective=case.objective, data_path=[str(folder / "pairs")])
    config = configuration(data, **train)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"):
        setattr(config.model, name, getattr(inner.config, name))
    return use_preferences(config, data), [model]


def first_steps(cases: list[Case], folder: str) -> list[dict[str, Any] | None]:
    """Loss, metrics and gradients of each case's first step."""
    install_stand_in()
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceFinetune

    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> dict[str, Any] | None:
        config, models = prepare(case, Path(folder), groups)
        step = PreferenceFinetune()
        found = FirstStep(step, Path(folder) / "model")
        finetune(config, step, [step, found], models, dp=groups.dp)
        return found.result

    return run_at_layouts(compute, cases, folder, None)  # type: ignore[arg-type]
