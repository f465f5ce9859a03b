"""What one rank does in tests of Megatron-Bridge itself: its own ``finetune``, from a Hugging Face model on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.integration.worlds import Case
from tests.plugin.adapters.bridge_on_cpu import WITHOUT_KERNELS, import_bridge
from tests.plugin.adapters.first_step import FirstStep


def configure(folder: Path, case: Case, save: Path | None = None, **changes: Any) -> Any:
    """The recipe's configuration for a case, on the CPU in fp32."""
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceData
    from megatron_rmipo.plugin.adapters.megatron_bridge_recipe import rmipo_finetune_config

    settings: dict[str, Any] = {"train_iters": 1, "global_batch_size": 24, "micro_batch_size": 4, "lr": 1e-3, **changes}
    data = PreferenceData(objective=case.objective, data_path=[str(folder / "pairs")], valid_data_path=[str(folder / "pairs")])
    config = rmipo_finetune_config(
        str(folder / "model"),
        data,
        save=str(save or folder / "run"),
        precision=None,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        sequence_parallel=case.sequence_parallel,
        model_settings=WITHOUT_KERNELS,
        **settings,
    )
    config.dist.distributed_backend = "gloo"
    config.tokenizer.tokenizer_type, config.tokenizer.vocab_size = "NullTokenizer", config.model.vocab_size - 1
    # torch's Adam, which there is without kernels, cannot go on from a checkpoint of the distributed optimizer.
    config.optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = False
    config.optimizer.clip_grad = 0.0
    if save is None:
        config.checkpoint.save = config.checkpoint.load = None
    return config


def start() -> Any:
    """Import the package on this rank and join the others; ``finetune``."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from megatron_rmipo.runtime.cpu import install_cpu_runtime

    install_cpu_runtime()
    import_bridge()
    from megatron.bridge.training.finetune import finetune

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return finetune


def first_steps(cases: list[Case], folder: str) -> list[dict[str, Any] | None]:
    """Loss, metrics and gradients of each case's first step."""
    finetune, results = start(), []
    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceFinetune

    for case in cases:
        step = PreferenceFinetune()
        found = FirstStep(step, Path(folder) / "model")
        finetune(configure(Path(folder), case), step, callbacks=[step, found])
        results.append(found.result)
    return results


class Losses:
    """A callback that keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_step_end(self, context: Any) -> None:
        self.found.append(context.loss_dict["loss"].item())


def goes_on(folder: str, rank: int | None) -> dict[str, Any]:
    """Losses and state of four steps, and of the last two from a checkpoint between; of all weights, or of an adapter's."""
    finetune, losses, states = start(), [], []
    from megatron.bridge.peft.lora import LoRA

    from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceFinetune

    for number, loaded in enumerate((None, "run-0")):
        peft = None if rank is None else LoRA(dim=rank, alpha=rank)
        small = {"train_iters": 4, "global_batch_size": 8, "micro_batch_size": 2, "eval_iters": 2, "eval_interval": 2}
        save = Path(folder) / f"run-{number}"
        config = configure(Path(folder), Case("", objective="beta_dpo"), save, save_interval=2, peft=peft, **small)
        if loaded is not None:
            config.checkpoint.load, config.checkpoint.ckpt_step = str(Path(folder) / loaded), 2
        step, kept = PreferenceFinetune(), Losses()
        finetune(config, step, callbacks=[step, kept])
        losses.append(kept.found)
        states.append(dict(step.step.state))  # type: ignore[union-attr]
    return {"losses": losses, "states": states}
