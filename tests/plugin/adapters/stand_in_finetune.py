"""A stand-in for Megatron-Bridge's ``finetune``, of which it keeps the order of calls as 0.6.2 has it.

``setup``: the model, its checkpoint, ``on_data_init_start``, data sets, iterators. ``train``: ``on_train_step_start``, the
schedule, the reduction of reports, ``on_train_step_end``, evaluation, ``on_checkpoint_save``. Weights stay.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, get_rerun_state_machine


@dataclasses.dataclass
class CallbackContext:
    state: Any
    model: list[Any]
    loss_dict: dict[str, torch.Tensor] | None = None
    grad_norm: float | None = None
    skipped_iter: bool | None = None


class Callback:
    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda context: None


@dataclasses.dataclass(kw_only=True)
class DataloaderConfig:
    dataloader_type: str | None = None
    num_workers: int = 2


@dataclasses.dataclass
class DatasetProvider(DataloaderConfig, ABC):
    @abstractmethod
    def build_datasets(self, context: Any) -> Any: ...


def install_stand_in() -> None:
    """Make what the adapter imports importable, in this process."""
    base: Any = ModuleType("megatron.bridge.data.base")
    base.DatasetProvider, base.DatasetBuildContext = DatasetProvider, SimpleNamespace
    callbacks: Any = ModuleType("megatron.bridge.training.callbacks")
    callbacks.Callback, callbacks.CallbackContext = Callback, CallbackContext
    for name in ("megatron.bridge", "megatron.bridge.data", "megatron.bridge.training"):
        sys.modules[name] = ModuleType(name)
    sys.modules[base.__name__], sys.modules[callbacks.__name__] = base, callbacks


def configuration(data: Any, **train: Any) -> Any:
    """A ``ConfigContainer``, as far as the adapter and this loop read one."""
    return SimpleNamespace(
        dataset=data,
        model=SimpleNamespace(
            vocab_size=84,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
            sequence_parallel=False,
            num_moe_experts=None,
            calculate_per_token_loss=False,
            variable_seq_lengths=False,
            deallocate_pipeline_outputs=True,
        ),
        ddp=SimpleNamespace(average_in_collective=True),
        dist=SimpleNamespace(use_decentralized_pg=False, use_megatron_fsdp=False, use_torch_fsdp2=False),
        inprocess_restart=None,
        peft=None,
        train=SimpleNamespace(
            **{
                "train_iters": 1,
                "train_samples": None,
                "global_batch_size": 24,
                "micro_batch_size": 4,
                "rampup_batch_size": None,
                "decrease_batch_size_if_needed": False,
                **train,
            }
        ),
        validation=SimpleNamespace(eval_iters=0, eval_global_batch_size=6, eval_micro_batch_size=3),
        checkpoint=SimpleNamespace(save=None, load=None, async_save=False, non_persistent_save_interval=None),
    )


def finetune(config: Any, forward_step: Any, callbacks: list[Any], models: list[Any], *, dp: Any, start: int = 0) -> Any:
    """Train a model that is there already, from step ``start`` on.

    Args:
        config: as of :func:`configuration`.
        forward_step, callbacks: as of the package's.
        models: the model in DDP.
        dp: the data-parallel group.
        start: steps that were run before.

    Returns:
        By step of training, and ``valid`` by step, the reduced reports (empty off the last stage).
    """
    size = config.train.global_batch_size
    train_state = SimpleNamespace(step=start, consumed_train_samples=start * size)
    context = CallbackContext(SimpleNamespace(cfg=config, train_state=train_state), models)
    found: dict[Any, Any] = {}

    def fire(event: str, **further: Any) -> None:
        for callback in callbacks:
            getattr(callback, event, lambda context: None)(dataclasses.replace(context, **further))

    fire("on_data_init_start")
    train_data, valid_data, _ = config.dataset.build_datasets(None)
    train_data, valid_data = (None if data is None else RerunDataIterator(data) for data in (train_data, valid_data))
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)
    for module in models:
        module.train()
    while train_state.step < config.train.train_iters:
        fire("on_train_step_start")
        models[0].zero_grad_buffer()
        loss_dict = _run(forward_step, train_data, models, size // (config.train.micro_batch_size * dp.size()), dp)
        fire("on_train_step_end", loss_dict=loss_dict, skipped_iter=False)
        train_state.step += 1
        train_state.consumed_train_samples += size
        found[train_state.step] = loss_dict
        if valid_data is not None:
            found["valid", train_state.step] = _evaluate(config, forward_step, valid_data, models, dp, fire)
        if config.checkpoint.save is not None:
            (Path(config.checkpoint.save) / f"iter_{train_state.step:07d}").mkdir(parents=True)
            fire("on_checkpoint_save")
    return found


def _evaluate(config: Any, forward_step: Any, data: Iterator[Any], models: list[Any], dp: Any, fire: Any) -> Any:
    validation = config.validation
    for module in models:
        module.eval()
    fire("on_eval_start")
    reports = []
    with torch.no_grad():
        for _ in range(validation.eval_iters):
            fire("on_eval_step_start")
            count = validation.eval_global_batch_size // (validation.eval_micro_batch_size * dp.size())
            reports.append(_run(forward_step, data, models, count, dp, forward_only=True))
    for module in models:
        module.train()
    return reports


def _run(forward_step: Any, data: Any, models: list[Any], count: int, dp: Any, *, forward_only: bool = False) -> dict[str, Any]:
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=models,
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    reduced = {}
    for key in reports[0] if reports else ():
        value = torch.vstack([report[key].view(-1) for report in reports]).sum(dim=0)
        dist.all_reduce(value, group=dp)
        reduced[key] = value[0] / value[1]
    return reduced
