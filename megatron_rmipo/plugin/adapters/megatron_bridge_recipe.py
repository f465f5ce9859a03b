"""A recipe of Megatron-Bridge for preference optimization: one function that returns its ``ConfigContainer``."""

from __future__ import annotations

from typing import Any

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.megatron_bridge import PreferenceData, use_preferences


def rmipo_finetune_config(
    hf_path: str,
    data: PreferenceData,
    *,
    save: str,
    train_iters: int,
    global_batch_size: int = 128,
    micro_batch_size: int = 1,
    lr: float | None = None,
    lr_warmup_fraction: float = 0.1,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    seq_length: int | None = None,
    precision: str | None = "bf16_mixed",
    peft: Any = None,
    eval_interval: int = 100,
    eval_iters: int = 0,
    save_interval: int = 100,
    model_settings: dict[str, Any] | None = None,
) -> Any:
    """A configuration for ``finetune``: full training, or of an adapter, from a Hugging Face model, by the paper's settings.

    Args:
        hf_path: the model, its tokenizer and its weights; a directory, or a name of the hub.
        data: the pairs and the objective.
        save: where checkpoints go; a run goes on from the latest one there.
        train_iters: optimizer steps.
        global_batch_size: pairs of a step.
        micro_batch_size: pairs of a row on average; a step has ``global_batch_size / (micro_batch_size x DP)`` rows a rank.
        lr: peak learning rate; None: the objective's own.
        lr_warmup_fraction: share of the steps in which it rises; it falls by a cosine to 0.
        tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel: Megatron's layout.
        seq_length: longest sequence, prompt and response; None: as many as the model takes.
        precision: a mixed precision of Megatron-Bridge by name; None: fp32.
        peft: such as ``megatron.bridge.peft.lora.LoRA(dim=32)``.
        eval_interval, eval_iters: evaluate so many batches of ``data.valid_data_path`` every so many steps.
        save_interval: write a checkpoint every so many steps.
        model_settings: further fields of the model's provider.

    Returns:
        A ``megatron.bridge.training.config.ConfigContainer``.

    Raises:
        ConfigError: no such objective, or the provider has no such field.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training import config as bridge

    # Its weights are loaded as the pretrained checkpoint: only where the run does not go on.
    model = AutoBridge.from_hf_pretrained(hf_path).to_megatron_provider(load_weights=False)
    layout = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "sequence_parallel": sequence_parallel,
        "seq_length": model.seq_length if seq_length is None else seq_length,
    }
    for name, value in {**layout, **(model_settings or {})}.items():
        if not hasattr(model, name):
            raise ConfigError(f"{hf_path}: Megatron-Bridge's {type(model).__name__} has no field {name}, to be {value!r}.")
        setattr(model, name, value)
    rate = build_objective(data.objective, data.objective_options).default_lr if lr is None else lr
    config = bridge.ConfigContainer(
        model=model,
        dataset=data,
        train=bridge.TrainingConfig(
            train_iters=train_iters, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ),
        validation=bridge.ValidationConfig(eval_interval=eval_interval, eval_iters=eval_iters),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam",
            lr=rate,
            min_lr=0.0,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            clip_grad=1.0,
            use_distributed_optimizer=True,
            bf16=precision is not None and precision.startswith("bf16"),
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_fraction=lr_warmup_fraction,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        ddp=bridge.DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_path),
        checkpoint=bridge.CheckpointConfig(
            save=save, load=save, pretrained_checkpoint=hf_path, save_interval=save_interval, fully_parallel_save=True
        ),
        mixed_precision=precision,
        peft=peft,
    )
    return use_preferences(config, data)
