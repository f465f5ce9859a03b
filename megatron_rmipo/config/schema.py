"""The configuration of a run: one dataclass per concern, one field per flag, Megatron's names.

A field ``tensor_model_parallel_size`` is the flag ``--tensor-model-parallel-size`` (underscores are accepted too) and the YAML
key ``tensor_model_parallel_size``. :mod:`megatron_rmipo.config.parsing` reads flags and files into these classes; the command
line wins over the file, the file over the defaults below.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_rmipo.config.flags.evaluation import EvaluationConfig
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.options import described, option
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.whole_files import replace_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: where its weights come from and how it is computed."""

    load_hf: str | None = option(
        None,
        "Hugging Face model to start from where --load holds no complete checkpoint; or a PEFT LoRA adapter, which is merged.",
        "DIR",
    )
    base_hf: str | None = option(
        None, "Base model of an adapter in --load-hf or --reference-hf; unset: the directory that the adapter names.", "DIR"
    )
    hf_read: Literal["each", "broadcast"] = option(
        "broadcast",
        "Who reads the weights of --load-hf and --reference-hf: broadcast: of the ranks that hold the same slices each reads its "
        "share and sends it to the others, so that a slice is read once; each: every rank reads all of its slices.",
    )
    bridge: Literal["megatron-bridge"] | None = option(
        None,
        "Build, load and export the models of --load-hf and --reference-hf through NVIDIA's Megatron-Bridge, which has to be "
        "installed, whether their family is known here or not; for dense families that are not. --load needs --load-hf beside "
        "it, the model that the run began with. Sizes for batches and memory are estimated. Tested with a stand-in of its "
        "interface; the package itself was run on the CPU alone.",
    )
    reference_hf: str | None = option(
        None,
        "Hugging Face model that is the reference, for objectives that need one; unset: the model the run starts from.",
        "DIR",
    )
    reference_load: str | None = option(None, "The same as a Megatron checkpoint directory.", "DIR")
    reference_cache: str | None = option(
        None, "Directory of the reference's log-probs, computed once; unset: beside the data, in PREFIX.reference/.", "DIR"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "Layer implementation; auto: transformer_engine where it is installed and CUDA is present, else local."
    )
    model_class: Literal["gpt", "hybrid"] = option(
        "gpt",
        "Megatron-Core's class of the model: GPTModel, or HybridModel where it has one (0.19); they compute the same, and a "
        "checkpoint of one goes on as the other.",
    )
    attention_backend: Literal["auto", "sdpa", "flex", "te"] = option(
        "auto",
        "Attention over packed pairs; te: Transformer Engine; auto: flex with CUDA and heads of 16 or more, sdpa elsewhere.",
    )
    bf16: bool = option(False, "Compute in bfloat16 with fp32 master weights; without it everything is fp32.")
    fp8_format: Literal["hybrid", "e4m3"] | None = option(
        None, "Matrix products of the policy's layers in fp8: e4m3, or hybrid, with gradients in e5m2. Needs Transformer Engine."
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = option(
        None, "With --fp8-format: how numbers are scaled into fp8; unset: delayed."
    )
    make_vocab_size_divisible_by: int = option(128, "Pad the vocabulary to a multiple of this times TP.")
    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "Recompute activations in the backward pass: whole layers (full) or the attention core alone (selective)."
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "With full recomputation: uniform checkpoints every --recompute-num-layers layers, block only the first ones."
    )
    recompute_num_layers: int | None = option(
        None, "With full recomputation: layers per checkpoint (uniform) or layers recomputed per stage (block)."
    )
    share_prompts: bool = option(True, "Compute a prompt once for both of its responses; off: once for each.")
    logprob_chunk_size: int = option(
        4096, "Vocabulary entries whose logits exist at one time in the LM head; lower takes less memory."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts: how tokens reach them, and what is done about their load."""

    moe_aux_loss_coeff: float = option(
        0.0,
        "Weight of the load-balancing loss over the global batch's tokens; off by default: preference data are narrow, and would "
        "pull at a balance that pre-training made. Costs a forward pass.",
    )
    moe_z_loss_coeff: float = option(0.0, "Weight of the loss that keeps router logits small; 0: off.")
    moe_router_bias_update_rate: float = option(
        0.0, "How far a step moves the score biases of experts towards even load, in models that have them; 0: frozen."
    )
    moe_router_dtype: Literal["fp32", "fp64"] = option("fp32", "What routers compute in.")
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = option(
        "alltoall",
        "How tokens travel to other ranks' experts; flex: by the fused kernels of --moe-flex-dispatcher-backend (GPU).",
    )
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] | None = option(
        None, "With --moe-token-dispatcher-type flex: whose kernels; unset: deepep."
    )
    moe_grouped_gemm: bool = option(
        False, "One matrix product for all experts of a rank instead of one each. Needs Transformer Engine's layers."
    )
    moe_permute_fusion: bool = option(False, "Sort tokens by expert in fused kernels. Needs Transformer Engine.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: prepared preference pairs (see tools/preprocess_preferences.py)."""

    data_path: list[str] = dataclasses.field(
        default_factory=list,
        metadata=described(
            "Training data: one PREFIX (of PREFIX.bin, .idx, .json), or weights and prefixes: 0.7 A 0.3 B.", "PREFIX"
        ),
    )
    valid_data_path: list[str] | None = dataclasses.field(
        default=None, metadata=described("Held-out data for evaluation, in the form of --data-path.", "PREFIX")
    )
    split: str | None = option(
        None, "Hold out a share of --data-path instead of --valid-data-path: train,valid proportions as in 99,1.", "T,V"
    )
    seq_length: int = option(2048, "Most tokens of one prompt with one of its responses; data with longer ones is refused.")
    tokens_per_microbatch: int = option(
        8192,
        "Most tokens of one packed micro-batch, without padding; the number of micro-batches follows from it. Context-parallel "
        "ranks share them.",
    )
    min_microbatches_per_stage: int | None = option(
        None,
        "With pipeline stages: cut each rank's pairs into at least this many micro-batches for each stage, where pairs "
        "allow, so that stages wait less for each other; unset: as many as a step takes least with, by the number of its "
        "tokens and stages; 0: as few as fit.",
    )
    num_workers: int = option(2, "Processes that prepare micro-batches ahead of the model; 0: none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Objective: which loss, and its options.

    Attributes:
        objective: a name of the registry, ``package.module:Class``, or several of either with weights: ``dpo:0.8,sft:0.2``.
        options: every option of that objective with its value, defaults included.
    """

    objective: str = option(
        "rmipo",
        "The loss: {objectives}, or package.module:Class for one of your own; several with weights as dpo:0.8,sft:0.2.",
        "NAME",
    )
    pair_weight: bool = option(False, "Multiply each pair's loss by its weight, from the data's column of that name.")
    options: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"flag": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam"] = option("adam", "Optimizer; adam is AdamW (decoupled weight decay).")
    lr: float = option(6e-7, "Peak learning rate; the default is the objective's own, and another with: sft 2e-5.")
    min_lr: float = option(0.0, "Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = option("cosine", "Shape of the decay after the warm-up.")
    lr_warmup_fraction: float | None = option(None, "Share of all iterations with linear warm-up, e.g. 0.1.")
    lr_warmup_iters: int = option(0, "Iterations of linear warm-up; not together with --lr-warmup-fraction.")
    weight_decay: float = option(0.0, "Decoupled weight decay; norm weights are exempt.")
    adam_beta1: float = option(0.9, "Adam: decay of the gradient's running mean.")
    adam_beta2: float = option(0.999, "Adam: decay of the squared gradient's running mean.")
    adam_eps: float = option(1e-8, "Adam: term added to the denominator.")
    clip_grad: float = option(1.0, "Clip the global gradient norm to this; 0: never.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training: batch, length, evaluation, seeds."""

    global_batch_size: int = option(128, "Preference pairs per optimizer step, over all ranks.")
    train_iters: int | None = option(None, "Optimizer steps in all; not together with --epochs.")
    epochs: float | None = option(None, "Passes over the training data; 1 where neither this nor --train-iters is given.")
    eval_interval: int = option(
        0, "Evaluate every this many steps, and after the last one; 0: only at the start of a new run and at its end."
    )
    eval_pairs: int | None = option(None, "Held-out pairs per evaluation, the first ones; unset: all.")
    eval_at_start: bool = option(True, "Evaluate before the first step.")
    exit_interval: int | None = option(None, "Save and exit when the step number is a multiple of this.")
    seed: int = option(1234, "Seed of the data order and of every random generator.")
    max_skipped_steps: int = option(10, "Steps in all that may be skipped for a non-finite loss or gradient.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: Megatron's (to resume) and Hugging Face's (to use)."""

    save: str | None = option(None, "Directory to write checkpoints to, at the end and every --save-interval steps.", "DIR")
    save_interval: int | None = option(None, "Steps between checkpoints; unset: only at the end and at a signal.")
    async_save: bool = option(False, "Write the checkpoints of --save-interval beside the next steps; takes memory on the host.")
    load: str | None = option(None, "Checkpoint directory to go on from: its latest complete iteration, or its release.", "DIR")
    finetune: bool = option(False, "Take only the weights of --load and start at step 0.")
    no_load_optim: bool = option(False, "Do not load the optimizer's state.")
    no_load_rng: bool = option(False, "Do not load the random generators' states.")
    no_verify_checkpoint: bool = option(False, "Do not compare a checkpoint's files with their digests before it is loaded.")
    no_save_optim: bool = option(False, "Do not save the optimizer's state; such a checkpoint cannot be resumed exactly.")
    ckpt_format: Literal["torch_dist"] = option("torch_dist", "Format of checkpoints; any TP, PP, CP, EP and DP can load it.")
    keep_last: int | None = option(None, "Keep only this many of the newest checkpoints; unset: all.")
    save_hf: str | None = option(None, "Directory to write the final model to in Hugging Face form; all hosts see it.", "DIR")
    save_hf_from: Literal["last", "best"] = option(
        "last", "Which model --save-hf and --save-adapter write: that of the last step, or that of --keep-best."
    )
    save_hf_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Dtype of --save-hf; unset: that of the model it came from."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging: what is written down, and where."""

    log_interval: int = option(1, "Steps between log lines and records of metrics.jsonl.")
    log_dir: str | None = option(None, "Directory of metrics.jsonl and config.yaml; unset: SAVE/logs, or runs/rmipo.", "DIR")
    report: bool = option(True, "Write report.html beside metrics.jsonl when the run has ended: what it was, and how it went.")
    log_expert_load: bool = option(False, "Log every expert's share of its layer's tokens, too, not the imbalance alone.")
    tensorboard_dir: str | None = option(None, "Also write TensorBoard events to this directory.", "DIR")
    wandb_project: str | None = option(None, "Also log to this Weights & Biases project (needs the wandb extra).")
    wandb_exp_name: str | None = option(None, "Name of the Weights & Biases run.")
    mlflow_experiment: str | None = option(
        None, "Also log to this MLflow experiment, of the server in MLFLOW_TRACKING_URI (needs the mlflow extra)."
    )
    debug: bool = option(False, "Show tracebacks of errors a user can mend, and warnings of other packages.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Profiling: a trace of a few steps, and the history of the device's memory."""

    profile: bool = option(False, "Trace a few steps with torch.profiler, to profile/rank0.json.gz in the log directory.")
    profile_step_start: int | None = option(None, "With --profile: trace the steps after this one; unset: 10.")
    profile_step_end: int | None = option(None, "With --profile: the last step traced; unset: 12.")
    profile_ranks: list[int] | None = dataclasses.field(
        default=None, metadata=described("With --profile: the ranks traced, a file for each; unset: 0.", "RANK")
    )

    record_memory_history: bool = option(
        False, "With CUDA: keep where memory was allocated, for the snapshot that is written when memory runs out."
    )

    @property
    def steps(self) -> range:
        """Numbers of the steps to trace, counted from 1. Defaults, and which steps are meant, are Megatron-LM's."""
        start = 10 if self.profile_step_start is None else self.profile_step_start
        end = 12 if self.profile_step_end is None else self.profile_step_end
        return range(start + 1, end + 1)

    @property
    def ranks(self) -> list[int]:
        """The ranks to trace."""
        return [0] if self.profile_ranks is None else self.profile_ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a training run was told."""

    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = dataclasses.field(default_factory=ProfilingConfig)
    planning: PlanningConfig = dataclasses.field(default_factory=PlanningConfig)

    def to_flat_dict(self) -> dict[str, Any]:
        """Every flag's name and value, the objective's options among them; plain types, as YAML and JSON hold them."""
        flat: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            own = getattr(self, section.name)
            flat.update(own.as_given() if isinstance(own, LoraConfig) else dataclasses.asdict(own))
        flat.update(flat.pop("options"))
        return flat

    def save_config(self, path: Path) -> None:
        """Write the whole configuration as YAML that ``--config`` reads back. Replaces the file in one step.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            replace_file(path, [yaml.safe_dump(self.to_flat_dict(), sort_keys=False)])
        except OSError as error:
            raise ConfigError(f"{path}: the configuration cannot be written there: {error.strerror}.") from error

    @property
    def log_directory(self) -> Path:
        """Where metrics.jsonl and config.yaml go."""
        if self.logging.log_dir:
            return Path(self.logging.log_dir)
        return Path(self.checkpoint.save) / "logs" if self.checkpoint.save else Path("runs/rmipo")
