"""Faults of flags that show without knowing the model, the machine or the number of ranks: a line each, with what would work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

from megatron_rmipo.config.flags.data import parse_blend, parse_split
from megatron_rmipo.config.flags.evaluation import EvaluationConfig, Metric, parse_early_stop, parse_eval_data, parse_metric
from megatron_rmipo.config.flags.lora import lora_problems
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.pipeline_split import split_flag_problems, split_flags
from megatron_rmipo.config.precedence import exclusive_problems
from megatron_rmipo.config.schema import (
    Config,
    DataConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    ProfilingConfig,
    TrainingConfig,
)
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.errors import ConfigError

_DTYPES = {"main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"}
_OFFLOADED = {"optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"}


def refuse(problems: Sequence[str]) -> None:
    """End a run that cannot work, all faults at once.

    Raises:
        ConfigError: there are faults.
    """
    if problems:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems))


def config_problems(config: Config) -> Iterator[str]:
    """Every fault of this kind."""
    yield from exclusive_problems(config)
    yield from parallel_problems(config)
    yield from recompute_problems(config)
    yield from offload_problems(config)
    yield from memory_problems(config)
    yield from expert_problems(config.experts)
    yield from lora_problems(config.lora)
    yield from adapter_problems(config)
    yield from _data_flags(config.data)
    yield from _optimizer_flags(config.optimizer, config.training)
    yield from _training_flags(config.training)
    yield from _checkpoint_flags(config)
    yield from _evaluation_and_logging_flags(config)
    yield from _profiling_flags(config.profiling)
    yield from planning_problems(config.planning)
    yield from profiled_steps_problems(config.profiling, config.training.train_iters)


def parallel_problems(config: Config) -> Iterator[str]:
    """Faults of the flags of parallelism."""
    parallel = config.parallel
    yield from _at_least(1, parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size")
    yield from _at_least(1, parallel, "expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size")
    yield from split_flag_problems(parallel)
    if parallel.context_parallel_size == 1 and parallel.cp_comm_type != ParallelConfig().cp_comm_type:
        yield f"--cp-comm-type {parallel.cp_comm_type} does nothing at --context-parallel-size 1; leave it out"
    elif parallel.cp_comm_type == "p2p":
        yield (
            "--cp-comm-type p2p: a prompt is shared by its responses, and no attention kernel hands such keys from rank to "
            "rank; all_gather would work with any model, a2a where the ranks divide its heads"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size 2 or more; leave it out at 1"
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce as well"
    yield from _at_least(1, parallel, "num_distributed_optimizer_instances")
    if parallel.num_distributed_optimizer_instances > 1 and not parallel.use_distributed_optimizer:
        yield "--num-distributed-optimizer-instances needs --use-distributed-optimizer: it says how often its state is there"
    yield from _at_least(0, config.data, "min_microbatches_per_stage")
    if config.data.min_microbatches_per_stage is not None and parallel.pipeline_model_parallel_size == 1:
        yield "--min-microbatches-per-stage does nothing at --pipeline-model-parallel-size 1; leave it out"
    if parallel.distributed_timeout_minutes <= 0:
        yield f"--distributed-timeout-minutes {parallel.distributed_timeout_minutes}: must be greater than 0"


def recompute_problems(config: Config) -> Iterator[str]:
    """Faults of the flags of recomputation and of sizes inside the model."""
    model, modules = config.model, config.memory.recompute_modules
    yield from _at_least(1, model, "make_vocab_size_divisible_by", "logprob_chunk_size", "recompute_num_layers")
    full = model.recompute_granularity == "full"
    if full and (model.recompute_method is None or model.recompute_num_layers is None):
        yield "--recompute-granularity full needs a method and a number: --recompute-method uniform --recompute-num-layers 1"
    if not full and (model.recompute_method is not None or model.recompute_num_layers is not None):
        yield "--recompute-method and --recompute-num-layers belong to --recompute-granularity full"
    if modules is None:
        return
    if model.recompute_granularity != "selective":
        yield "--recompute-modules belong to --recompute-granularity selective"
    if not modules:
        yield "--recompute-modules names none; leave it out, or name core_attn, which is what it is when unset"
    for part in ("moe_act", "shared_experts"):
        if part in modules and "moe" in modules:
            yield f"--recompute-modules {part} is part of moe, all of which is computed anew; name one of them"


def offload_problems(config: Config) -> Iterator[str]:
    """Faults of the flags of activations on the host."""
    memory, modules = config.memory, config.memory.offload_modules
    if not memory.fine_grained_activation_offloading:
        for name in ("offload_modules", "min_offloaded_tensor_size"):
            if getattr(memory, name) != getattr(MemoryConfig(), name):
                yield f"{flag_of(name)} does nothing without --fine-grained-activation-offloading"
        return
    if not modules:
        yield "--fine-grained-activation-offloading needs --offload-modules: whose inputs go to the host, e.g. core_attn"
    elif "attn_proj" in modules and "core_attn" not in modules:
        yield "--offload-modules attn_proj needs core_attn beside it, whose output is its input and is kept there, too"
    if config.model.recompute_granularity == "full":
        yield "--fine-grained-activation-offloading does nothing with --recompute-granularity full, which keeps none of them"
    yield from _at_least(1, memory, "min_offloaded_tensor_size")


def memory_problems(config: Config) -> Iterator[str]:
    """Faults of the flags of the optimizer's memory."""
    memory, unset = config.memory, MemoryConfig()
    changed = {name for name in _DTYPES | _OFFLOADED if getattr(memory, name) != getattr(unset, name)}
    if not memory.use_precision_aware_optimizer:
        yield from (f"{flag_of(name)} does nothing without --use-precision-aware-optimizer" for name in sorted(changed & _DTYPES))
    else:
        needed = {"--use-distributed-optimizer": config.parallel.use_distributed_optimizer, "--bf16": config.model.bf16}
        if missing := [flag for flag, given in needed.items() if not given]:
            yield f"--use-precision-aware-optimizer needs {' and '.join(missing)}"
    if not memory.optimizer_cpu_offload:
        yield from (f"{flag_of(name)} does nothing without --optimizer-cpu-offload" for name in sorted(changed & _OFFLOADED))
        return
    if not memory.use_precision_aware_optimizer:
        yield "--optimizer-cpu-offload needs --use-precision-aware-optimizer, whose code it uses"
    for name in sorted(changed & _DTYPES - {"main_grads_dtype"}):
        yield f"{flag_of(name)} does nothing with --optimizer-cpu-offload, whose state is fp32 on host and device; leave it out"
    if not 0 < memory.optimizer_offload_fraction <= 1:
        yield f"--optimizer-offload-fraction {memory.optimizer_offload_fraction}: must be greater than 0 and at most 1"


def expert_problems(experts: ExpertsConfig) -> Iterator[str]:
    """Faults of the flags of experts."""
    yield from _at_least(0, experts, "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate")
    if experts.moe_flex_dispatcher_backend and experts.moe_token_dispatcher_type != "flex":
        yield "--moe-flex-dispatcher-backend does nothing without --moe-token-dispatcher-type flex"


def adapter_problems(config: Config) -> Iterator[str]:
    """Faults of flags beside those of adapters."""
    lora, model, checkpoint = config.lora, config.model, config.checkpoint
    if not lora.is_on:
        return
    if model.load_hf is not None and lora.pretrained_checkpoint is not None:
        yield "--load-hf and --pretrained-checkpoint both name the frozen model; leave one out"
    if lora.reference_adapter is not None and (model.reference_hf or model.reference_load):
        yield "--reference-adapter makes the model itself the reference; leave out --reference-hf and --reference-load"
    if model.bridge is not None:
        yield "--bridge builds models whose weights are all trained; --lora-rank and --load-adapter need a family known here"
    if model.fp8_format is not None:
        yield "--fp8-format is not built with adapters, whose frozen weights would be kept beside their fp8 copies; leave it out"
    if config.memory.use_precision_aware_optimizer:
        yield "--use-precision-aware-optimizer is not for adapters, whose optimizer's state is small; leave it out"
    if lora.lora_modules_to_save and model.bf16 and config.parallel.overlap_param_gather:
        yield (
            "--overlap-param-gather with --lora-modules-to-save and --bf16: Megatron-Core gathers weights of one dtype after the "
            "other, and modules in bf16 do not stand behind the adapter in fp32; leave --overlap-param-gather out"
        )
    if config.experts.moe_router_bias_update_rate:
        yield (
            "--moe-router-bias-update-rate moves score biases of the frozen model, which an adapter does not hold and its "
            "reference would share; leave it out"
        )
    if lora.quantize_base is not None and checkpoint.save_hf is not None:
        yield (
            f"--save-hf would merge the adapter into weights of {lora.quantize_base}; write it with --save-adapter, and merge it "
            "into the model's own with tools/merge_adapter.py"
        )


def bridge_problems(config: Config) -> Iterator[str]:
    """Faults of flags beside ``--bridge``: what builds the model then says how, and has no such choices."""
    model = config.model
    if model.bridge is None:
        return
    if config.parallel.context_parallel_size > 1:
        yield "--context-parallel-size is not built with --bridge; leave it out, and share rows out with --sequence-parallel"
    if model.load_hf is None:
        yield "--bridge needs --load-hf DIR, beside --load too: the Hugging Face model, by whose files it builds and exports"
    if model.reference_load is not None:
        yield "--reference-load: --bridge builds references from Hugging Face models alone; name one with --reference-hf"
    if config.checkpoint.save_hf_dtype is not None:
        yield "--save-hf-dtype: --bridge exports in the dtype that is computed in; leave it out"
    if config.memory.fine_grained_activation_offloading:
        yield "--fine-grained-activation-offloading is not for models of --bridge; leave it out"
    if model.base_hf is not None:
        yield "--base-hf: --bridge builds from models alone; merge the adapter with PEFT, and leave it out"
    for name in ("transformer_impl", "model_class", "fp8_format", "fp8_recipe", "hf_read"):
        if getattr(model, name) != getattr(ModelConfig(), name):
            yield f"{flag_of(name)} does nothing with --bridge: Megatron-Bridge says what a model is built of; leave it out"
    for given in split_flags(config.parallel):
        yield f"{given}: with --bridge every pipeline stage holds one chunk of as many layers; leave it out"


def _data_flags(data: DataConfig) -> Iterator[str]:
    if not data.data_path:
        yield "--data-path is missing: the PREFIX that tools/preprocess_preferences.py wrote"
    for flag, values in (("--data-path", data.data_path), ("--valid-data-path", data.valid_data_path)):
        if values:
            yield from _message(functools.partial(parse_blend, values, flag))
    if data.split is not None:
        yield from _message(functools.partial(parse_split, data.split))
    yield from _at_least(2, data, "seq_length")
    yield from _at_least(0, data, "num_workers")
    if data.tokens_per_microbatch < data.seq_length:
        yield (
            f"--tokens-per-microbatch {data.tokens_per_microbatch} cannot hold --seq-length {data.seq_length}; at least twice "
            f"the length, {2 * data.seq_length}, holds every pair (a prompt and both responses)"
        )


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
    yield from _at_least(0, optimizer, "lr_warmup_iters", "weight_decay", "clip_grad")
    if training.train_iters is not None and optimizer.lr_warmup_iters > training.train_iters:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} is more than --train-iters {training.train_iters}"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"{flag_of(name)} {getattr(optimizer, name)}: must be at least 0 and less than 1"
    if optimizer.adam_eps <= 0:
        yield f"--adam-eps {optimizer.adam_eps}: must be greater than 0"


def _training_flags(training: TrainingConfig) -> Iterator[str]:
    yield from _at_least(1, training, "global_batch_size", "train_iters", "eval_pairs", "exit_interval")
    yield from _at_least(0, training, "eval_interval", "seed", "max_skipped_steps")
    if training.epochs is not None and training.epochs <= 0:
        yield f"--epochs {training.epochs}: must be greater than 0"


def _checkpoint_flags(config: Config) -> Iterator[str]:
    checkpoint, model = config.checkpoint, config.model
    if not checkpoint.load and not model.load_hf and not config.lora.pretrained_checkpoint:
        yield "nothing to start from: give --load-hf DIR (Hugging Face) or --load DIR (a Megatron checkpoint)"
    yield from _at_least(1, checkpoint, "save_interval", "keep_last")
    if not checkpoint.save:
        for name in ("save_interval", "keep_last", "no_save_optim", "async_save"):
            if getattr(checkpoint, name):
                yield f"{flag_of(name)} does nothing without --save DIR"
    elif checkpoint.async_save and not checkpoint.save_interval:
        yield "--async-save does nothing without --save-interval N: a run waits for the checkpoint it ends with"
    if not checkpoint.load:
        for name in ("finetune", "no_load_optim", "no_load_rng"):
            if getattr(checkpoint, name):
                yield f"{flag_of(name)} does nothing without --load DIR"
    if model.hf_read != ModelConfig().hf_read and not (model.load_hf or model.reference_hf):
        yield f"--hf-read {model.hf_read} does nothing without --load-hf DIR or --reference-hf DIR"
    if checkpoint.save_hf_dtype and not checkpoint.save_hf:
        yield "--save-hf-dtype does nothing without --save-hf DIR"


def _evaluation_and_logging_flags(config: Config) -> Iterator[str]:
    yield from _at_least(1, config.logging, "log_interval")
    if config.logging.wandb_exp_name and not config.logging.wandb_project:
        yield "--wandb-exp-name does nothing without --wandb-project"
    has_main = bool(config.data.valid_data_path) or config.data.split is not None
    if not (has_main or config.evaluation.eval_data):
        for name in ("eval_interval", "eval_pairs"):
            if getattr(config.training, name):
                yield f"{flag_of(name)} needs held-out data: --valid-data-path PREFIX, --split 99,1 or --eval-data NAME=PREFIX"
    yield from _choice_flags(config, has_main=has_main)
    yield from _sample_flags(config.evaluation)


def _choice_flags(config: Config, *, has_main: bool) -> Iterator[str]:
    """Faults of the flags that name held-out sets, and choose among their evaluations."""
    flags = config.evaluation
    faults = list(_message(functools.partial(parse_eval_data, flags.eval_data or [])))
    yield from faults
    exports = config.checkpoint.save_hf or config.lora.save_adapter
    if config.checkpoint.save_hf_from == "best" and not (flags.keep_best and exports):
        yield "--save-hf-from best needs --keep-best METRIC and --save-hf DIR, or --save-adapter DIR"
    if flags.keep_best and not config.checkpoint.save:
        yield "--keep-best needs --save DIR: it keeps a checkpoint"
    sets = [""] * has_main + ([] if faults else list(flags.sets))
    given = {"--keep-best": (flags.keep_best, parse_metric), "--early-stop": (flags.early_stop, _metric_to_stop_by)}
    for flag, (text, parse) in given.items():
        if text is None or faults:
            continue
        wrong = list(_message(functools.partial(parse, text)))
        yield from wrong
        if not sets:
            yield f"{flag} needs held-out data: --valid-data-path PREFIX, --split 99,1 or --eval-data NAME=PREFIX"
        elif not config.training.eval_interval:
            yield f"{flag} needs --eval-interval N: it chooses among evaluations"
        elif not wrong and (held_out := parse(text).held_out) not in sets:
            known = ", ".join(f"{name}:METRIC" if name else "METRIC" for name in sets)
            named = f"there is no held-out set {held_out}" if held_out else "there is no main held-out set"
            yield f"{flag} {text}: {named}; there are: {known}"


def _metric_to_stop_by(text: str) -> Metric:
    return parse_early_stop(text)[0]


def _sample_flags(flags: EvaluationConfig) -> Iterator[str]:
    yield from _at_least(1, flags, "sample_interval", "sample_length")
    if not math.isfinite(flags.sample_temperature) or flags.sample_temperature < 0:
        yield f"--sample-temperature {flags.sample_temperature}: must be 0 or more"
    if flags.sample_prompts is None:
        for name in ("sample_interval", "sample_length", "sample_temperature"):
            if getattr(flags, name) != getattr(EvaluationConfig(), name):
                yield f"{flag_of(name)} does nothing without --sample-prompts FILE"


def _profiling_flags(profiling: ProfilingConfig) -> Iterator[str]:
    if not profiling.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
            if getattr(profiling, name) is not None:
                yield f"{flag_of(name)} does nothing without --profile"
        return
    yield from _at_least(0, profiling, "profile_step_start")
    if not profiling.steps:
        start, end = profiling.steps.start - 1, profiling.steps.stop - 1
        yield (
            f"--profile-step-end {end} must be greater than --profile-step-start {start}: the steps after the start are traced, "
            f"up to the end; --profile-step-end {max(start, 0) + 2} would trace two"
        )


def profiled_steps_problems(profiling: ProfilingConfig, train_iters: int | None) -> Iterator[str]:
    """Traced steps beyond the run's length; None where only the data tells it."""
    end = profiling.steps.stop - 1
    if profiling.profile and profiling.steps and train_iters is not None and 0 < train_iters < end:
        yield (
            f"--profile-step-end {end} lies beyond the run's {train_iters} steps; --profile-step-start {max(train_iters - 2, 0)} "
            f"--profile-step-end {train_iters} would work"
        )


def planning_problems(planning: PlanningConfig) -> Iterator[str]:
    """Faults of the flags of ``--dry-run``."""
    yield from _at_least(1, planning, "gpus", "nodes")
    if planning.gpu_memory_gb is not None and planning.gpu_memory_gb <= 0:
        yield f"--gpu-memory-gb {planning.gpu_memory_gb}: must be greater than 0"
    if not planning.dry_run:
        for name in ("gpus", "nodes", "gpu", "gpu_memory_gb", "interconnect"):
            if getattr(planning, name) is not None:
                yield f"{flag_of(name)} does nothing without --dry-run"


def _message(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _at_least(least: int, section: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            yield f"{flag_of(name)} {value}: must be at least {least}"
