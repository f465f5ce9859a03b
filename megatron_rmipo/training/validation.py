"""Impossible configurations, refused before any model is built, each with numbers that would work."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_rmipo.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProfilingConfig,
    TrainingConfig,
)
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.transformer_engine import fp8_width_problems, transformer_engine_problems


def validate(config: Config, architecture: ModelArchitecture, world_size: int) -> None:
    """Refuse what cannot work, all faults at once.

    Args:
        config: the run's configuration.
        architecture: the model it is to train.
        world_size: number of ranks torchrun started.

    Raises:
        ConfigError: one line per fault: the flags, their values, and values that would work.
    """
    ranks = _profiled_ranks(config.profiling, world_size)
    _raise([*flag_problems(config), *_layout_problems(config, architecture, world_size), *ranks])


def refuse_profiling_beyond_the_end(config: Config, train_iters: int) -> None:
    """The check of ``--profile-step-end`` for a run whose length only the data tells.

    Args:
        config: the run's configuration, validated.
        train_iters: optimizer steps of the whole run.

    Raises:
        ConfigError: as :func:`validate`.
    """
    _raise(list(_profiled_steps(config.profiling, train_iters)))


def refuse_impossible_layout(config: Config, architecture: ModelArchitecture, world_size: int) -> None:
    """The same for a command that trains nothing: layout, model and device flags alone.

    Raises:
        ConfigError: as :func:`validate`.
    """
    # A batch size is not a matter of such a command, nor is fp8, which a policy is trained in.
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, global_batch_size=world_size),
        model=dataclasses.replace(config.model, fp8_format=None, fp8_recipe=None),
    )
    own = [
        *_parallel_flags(config),
        *_device_flags(config),
        *_recompute_flags(config.model),
        *transformer_engine_problems(config.model),
    ]
    _raise([*own, *_layout_problems(config, architecture, world_size)])


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems))


def flag_problems(config: Config) -> list[str]:
    """The faults of a configuration that show without knowing the model or the number of ranks."""
    return [
        *_parallel_flags(config),
        *_device_flags(config),
        *_recompute_flags(config.model),
        *transformer_engine_problems(config.model),
        *_data_flags(config.data),
        *_optimizer_flags(config.optimizer, config.training),
        *_training_flags(config.training),
        *_checkpoint_flags(config.checkpoint, config.model),
        *_evaluation_and_logging_flags(config),
        *_profiling_flags(config.profiling),
        *_profiled_steps(config.profiling, config.training.train_iters),
    ]


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> list[tuple[float, str]]:
    """``["A"]`` or ``["0.7", "A", "0.3", "B"]`` as (weight, prefix) pairs; the weights are scaled to sum to 1.

    Raises:
        ConfigError: neither one prefix nor weights and prefixes in turn, or a weight that is not positive.
    """
    if len(values) == 1:
        return [(1.0, values[0])]
    form = f"{flag} {' '.join(values)}: expected one PREFIX, or weights and prefixes in turn: 0.7 A 0.3 B"
    if not values or len(values) % 2:
        raise ConfigError(form)
    try:
        weights = [float(weight) for weight in values[::2]]
    except ValueError:
        raise ConfigError(form) from None
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"{flag} {' '.join(values)}: every weight must be greater than 0")
    return [(weight / sum(weights), prefix) for weight, prefix in zip(weights, values[1::2], strict=True)]


def parse_split(split: str) -> tuple[float, float]:
    """``"99,1"`` as the shares (0.99, 0.01) of training and held-out data.

    Raises:
        ConfigError: not two numbers, not positive.
    """
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*,\s*\d+(\.\d+)?\s*", split) or 0.0 in map(float, split.split(",")):
        raise ConfigError(f"--split {split}: expected the proportions train,valid, both greater than 0, as in 99,1")
    train, valid = map(float, split.split(","))
    return train / (train + valid), valid / (train + valid)


def _layout_problems(config: Config, arch: ModelArchitecture, world_size: int) -> Iterator[str]:
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if tensor < 1 or pipeline < 1:
        return
    shared = math.gcd(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size)
    works = _divisors(shared)
    if tensor not in works:
        yield (
            f"--tensor-model-parallel-size {tensor} does not divide the model's {arch.num_attention_heads} attention heads, "
            f"{arch.num_query_groups} key/value heads and {arch.ffn_hidden_size} MLP channels alike; would work: {_list(works)}"
        )
    if arch.num_layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline} does not divide the model's {arch.num_layers} layers; "
            f"would work: {_list(_divisors(arch.num_layers))}"
        )
    ranks = tensor * pipeline
    if world_size % ranks:
        nearest = ranks * max(1, world_size // ranks)
        yield (
            f"TP {tensor} x PP {pipeline} needs a multiple of {ranks} ranks, but there are {world_size}; start {nearest} with "
            f"torchrun --nproc-per-node, or choose TP x PP among {_list(_divisors(world_size))}"
        )
    elif config.training.global_batch_size < world_size // ranks:
        yield (
            f"--global-batch-size {config.training.global_batch_size} leaves some of the {world_size // ranks} data-parallel "
            f"ranks without a pair; at least {world_size // ranks} would work"
        )
    if config.data.seq_length > arch.max_position_embeddings:
        yield (
            f"--seq-length {config.data.seq_length} is longer than the model's max_position_embeddings "
            f"{arch.max_position_embeddings}; up to that would work"
        )
    if arch.sliding_window is not None and config.data.seq_length > arch.sliding_window:
        yield (
            f"--seq-length {config.data.seq_length} is longer than the model's sliding window of {arch.sliding_window} tokens, "
            f"which attention over packed pairs does not cut at; up to {arch.sliding_window} would work"
        )
    if tensor in works:
        yield from fp8_width_problems(config.model, arch, tensor)
    layers = arch.num_layers // pipeline
    if config.model.recompute_num_layers is not None and config.model.recompute_num_layers > layers:
        yield (
            f"--recompute-num-layers {config.model.recompute_num_layers} is more than the {layers} layers of a pipeline stage; "
            f"1 to {layers} would work"
        )


def _parallel_flags(config: Config) -> Iterator[str]:
    parallel = config.parallel
    yield from _at_least(1, parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size")
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size 2 or more; leave it out at 1"
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce as well"
    if parallel.distributed_timeout_minutes <= 0:
        yield f"--distributed-timeout-minutes {parallel.distributed_timeout_minutes}: must be greater than 0"


def _recompute_flags(model: ModelConfig) -> Iterator[str]:
    yield from _at_least(1, model, "make_vocab_size_divisible_by", "logprob_chunk_size", "recompute_num_layers")
    full = model.recompute_granularity == "full"
    if full and (model.recompute_method is None or model.recompute_num_layers is None):
        yield "--recompute-granularity full needs a method and a number: --recompute-method uniform --recompute-num-layers 1"
    if not full and (model.recompute_method is not None or model.recompute_num_layers is not None):
        yield "--recompute-method and --recompute-num-layers belong to --recompute-granularity full"


def _data_flags(data: DataConfig) -> Iterator[str]:
    if not data.data_path:
        yield "--data-path is missing: the PREFIX that tools/preprocess_preferences.py wrote"
    for flag, values in (("--data-path", data.data_path), ("--valid-data-path", data.valid_data_path)):
        if values:
            yield from _message(functools.partial(parse_blend, values, flag))
    if data.split is not None:
        yield from _message(functools.partial(parse_split, data.split))
        if data.valid_data_path:
            yield "--split and --valid-data-path both name held-out data; give one of them"
    yield from _at_least(2, data, "seq_length")
    yield from _at_least(0, data, "num_workers")
    if data.tokens_per_microbatch < data.seq_length:
        yield (
            f"--tokens-per-microbatch {data.tokens_per_microbatch} cannot hold --seq-length {data.seq_length}; at least twice "
            f"the length, {2 * data.seq_length}, holds every pair (a prompt and both responses)"
        )


def _device_flags(config: Config) -> Iterator[str]:
    local_ranks, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available():
        if local_ranks > num_gpus:
            yield f"torchrun started {local_ranks} ranks on this machine, which has {num_gpus} GPUs; up to {num_gpus} would work"
        if config.parallel.distributed_backend == "gloo":
            yield "--distributed-backend gloo is for machines without CUDA; leave it out, or use nccl"
        return
    if config.model.attention_backend == "flex":
        yield "--attention-backend flex needs CUDA (FlexAttention has no backward pass without); sdpa would work"
    if config.parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs CUDA; gloo would work"
    if config.profiling.record_memory_history:
        yield "--record-memory-history needs CUDA, whose allocator keeps it; leave it out"


def _optimizer_flags(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    if optimizer.lr <= 0:
        yield f"--lr {optimizer.lr}: must be greater than 0"
    if not 0 <= optimizer.min_lr <= max(optimizer.lr, 0):
        yield f"--min-lr {optimizer.min_lr}: must lie between 0 and --lr {optimizer.lr}"
    if optimizer.lr_decay_style == "constant" and optimizer.min_lr:
        yield "--min-lr does nothing with --lr-decay-style constant; leave it out"
    fraction = optimizer.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        yield f"--lr-warmup-fraction {fraction}: must be at least 0 and less than 1, e.g. 0.1"
    if fraction is not None and optimizer.lr_warmup_iters:
        yield "--lr-warmup-fraction and --lr-warmup-iters both set the warm-up; give one of them"
    yield from _at_least(0, optimizer, "lr_warmup_iters", "weight_decay", "clip_grad")
    if training.train_iters is not None and optimizer.lr_warmup_iters > training.train_iters:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} is more than --train-iters {training.train_iters}"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"{_flag(name)} {getattr(optimizer, name)}: must be at least 0 and less than 1"
    if optimizer.adam_eps <= 0:
        yield f"--adam-eps {optimizer.adam_eps}: must be greater than 0"


def _training_flags(training: TrainingConfig) -> Iterator[str]:
    yield from _at_least(1, training, "global_batch_size", "train_iters", "eval_pairs", "exit_interval")
    yield from _at_least(0, training, "eval_interval", "seed", "max_skipped_steps")
    if training.train_iters is not None and training.epochs is not None:
        yield f"--train-iters {training.train_iters} and --epochs {training.epochs} both set the length; give one of them"
    if training.epochs is not None and training.epochs <= 0:
        yield f"--epochs {training.epochs}: must be greater than 0"


def _checkpoint_flags(checkpoint: CheckpointConfig, model: ModelConfig) -> Iterator[str]:
    if not checkpoint.load and not model.load_hf:
        yield "nothing to start from: give --load-hf DIR (Hugging Face) or --load DIR (a Megatron checkpoint)"
    yield from _at_least(1, checkpoint, "save_interval", "keep_last")
    if not checkpoint.save:
        for name in ("save_interval", "keep_last", "no_save_optim"):
            if getattr(checkpoint, name):
                yield f"{_flag(name)} does nothing without --save DIR"
    if not checkpoint.load:
        for name in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(checkpoint, name):
                yield f"{_flag(name)} does nothing without --load DIR"
    if checkpoint.save_hf_dtype and not checkpoint.save_hf:
        yield "--save-hf-dtype does nothing without --save-hf DIR"


def _evaluation_and_logging_flags(config: Config) -> Iterator[str]:
    yield from _at_least(1, config.logging, "log_interval")
    if config.logging.wandb_exp_name and not config.logging.wandb_project:
        yield "--wandb-exp-name does nothing without --wandb-project"
    if not config.data.valid_data_path and config.data.split is None:
        for name in ("eval_interval", "eval_pairs"):
            if getattr(config.training, name):
                yield f"{_flag(name)} needs held-out data: --valid-data-path PREFIX, or --split 99,1"


def _profiling_flags(profiling: ProfilingConfig) -> Iterator[str]:
    if not profiling.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
            if getattr(profiling, name) is not None:
                yield f"{_flag(name)} does nothing without --profile"
        return
    yield from _at_least(0, profiling, "profile_step_start")
    if not profiling.steps:
        start, end = profiling.steps.start - 1, profiling.steps.stop - 1
        yield (
            f"--profile-step-end {end} must be greater than --profile-step-start {start}: the steps after the start are traced, "
            f"up to the end; --profile-step-end {max(start, 0) + 2} would trace two"
        )


def _profiled_steps(profiling: ProfilingConfig, train_iters: int | None) -> Iterator[str]:
    end = profiling.steps.stop - 1
    if profiling.profile and profiling.steps and train_iters is not None and 0 < train_iters < end:
        yield (
            f"--profile-step-end {end} lies beyond the run's {train_iters} steps; --profile-step-start {max(train_iters - 2, 0)} "
            f"--profile-step-end {train_iters} would work"
        )


def _profiled_ranks(profiling: ProfilingConfig, world_size: int) -> Iterator[str]:
    if not profiling.profile:
        return
    unknown = [rank for rank in profiling.ranks if not 0 <= rank < world_size]
    if unknown or not profiling.ranks:
        exist = f"0 to {world_size - 1}" if world_size > 1 else "0"
        yield f"--profile-ranks {' '.join(map(str, profiling.ranks))}: this run has rank{'s' * (world_size > 1)} {exist} alone"


def _message(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _at_least(least: int, section: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            yield f"{_flag(name)} {value}: must be at least {least}"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
