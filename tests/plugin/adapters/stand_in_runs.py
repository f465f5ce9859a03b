"""What one rank does in tests of the adapter over the stand-in: a plain GPTModel in DDP, attached by the adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.errors import CheckpointError, ConfigError, RmipoError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime
from tests.integration.worlds import Case, run_at_layouts
from tests.plugin.adapters.first_step import FirstStep
from tests.plugin.adapters.stand_in_finetune import configuration, finetune, install_stand_in
from tests.plugin.bridge_wrappers import wrap_linears
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


def goes_on(folder: str) -> dict[str, Any]:
    """Four steps of an objective with a state, evaluated after each; the last two again from a checkpoint."""
    install_stand_in()
    from megatron_rmipo.plugin.adapters.megatron_bridge import STATE_FILE, PreferenceFinetune

    groups, run = initialize_runtime(), Path(folder) / "run"
    whole, state = {}, {}
    for name, start in (("whole", 0), ("from the middle", 2)):
        config, models = prepare(Case(name, objective="bco_pair"), Path(folder), groups, train_iters=4, global_batch_size=6)
        config.train.micro_batch_size = 2
        config.dataset.valid_data_path, config.validation.eval_iters = config.dataset.data_path, 2
        config.checkpoint.save, config.checkpoint.load = (run, None) if start == 0 else (None, run)
        step = PreferenceFinetune()
        whole[name] = finetune(config, step, [step], models, dp=groups.dp, start=start)
        state[name] = dict(step.step.state)  # type: ignore[union-attr]
    (run / "iter_0000002" / STATE_FILE).unlink()
    # The model is attached already, and is not asked for again.
    with (
        mock.patch("megatron_rmipo.plugin.adapters.megatron_bridge.attach_model"),
        pytest.raises(CheckpointError, match=rf"iter_0000002.{STATE_FILE}: what objective bco_pair carries .* cannot be read"),
    ):
        finetune(config, PreferenceFinetune(), [PreferenceFinetune()], models, dp=groups.dp, start=2)
    return {"reports": whole, "state": state}


def adapted(folder: str) -> dict[str, float]:
    """The first loss of models with fresh adapters, whose reference is the model itself, by objective."""
    install_stand_in()
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceFinetune

    groups, losses = initialize_runtime(tensor_model_parallel_size=2), {}
    alone = Path(folder) / "alone"
    if groups.rank == 0:
        alone.mkdir()
        for path in Path(folder).glob("pairs.*"):
            if path.is_file():
                (alone / path.name).symlink_to(path)
    dist.barrier()
    for name in ("dpo", "kto", "epsilon_dpo"):
        config, (model,) = prepare(Case(name, tp=2, objective=name), Path(folder), groups)
        inner = unwrapped(model)
        wrap_linears(inner, "LoRA", dim=4, alpha=6.0)
        wrapped = DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
        config.dataset.data_path, config.peft = [str(alone / "pairs")], "LoRA"
        step = PreferenceFinetune()
        report = finetune(config, step, [step], [wrapped], dp=groups.dp)
        losses[name] = report[1]["loss"].item()
    return losses


def refusals(folder: str) -> dict[str, str]:
    """What is said of each configuration that does not go together with preference pairs, by what was changed."""
    install_stand_in()
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceFinetune

    groups, said = initialize_runtime(), {}

    def ask(name: str, *, objective: str = "simpo", callback: bool = True, **changes: Any) -> None:
        config, models = prepare(Case(name, objective=objective), Path(folder), groups)
        for path, value in changes.items():
            section, field = path.split("__")
            setattr(getattr(config, section), field, value)
        step = PreferenceFinetune()
        with pytest.raises(RmipoError) as refused:
            finetune(config, step, [step] if callback else [], models, dp=groups.dp)
        said[name] = str(refused.value)

    ask(
        "mean of means",
        model__calculate_per_token_loss=False,
        ddp__average_in_collective=True,
        train__rampup_batch_size=[1, 1, 9],
    )
    ask("interleaved", model__virtual_pipeline_model_parallel_size=2, dist__use_megatron_fsdp=True)
    ask("a reference in memory", objective="epsilon_dpo")
    ask("state lost", objective="beta_dpo", checkpoint__async_save=True, checkpoint__non_persistent_save_interval=5)
    ask("no callback", callback=False)
    ask("too few held-out pairs", dataset__valid_data_path=[f"{folder}/pairs"], validation__eval_iters=5)
    ask("no reference", objective="dpo", dataset__reference_cache=f"{folder}/elsewhere")
    config, models = prepare(Case("other data"), Path(folder), groups)
    config.dataset = object()
    with pytest.raises(ConfigError, match=r"config\.dataset is a object: call use_preferences"):
        PreferenceFinetune().on_data_init_start(_context(config, models))
    return said


def _context(config: Any, models: list[Any]) -> Any:
    from tests.plugin.adapters.stand_in_finetune import CallbackContext

    return CallbackContext(SimpleNamespace(cfg=config, train_state=SimpleNamespace(step=0)), models)
