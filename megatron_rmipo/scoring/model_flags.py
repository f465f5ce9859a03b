"""The trainer's flags that say which model is scored, and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import CheckpointConfig, Config, DataConfig, ExpertsConfig, LoggingConfig, ModelConfig

# Section of the configuration -> names of its fields.
MODEL_FLAGS: Mapping[type, tuple[str, ...]] = {
    CheckpointConfig: ("load", "no_verify_checkpoint"),
    ModelConfig: (
        "load_hf",
        "base_hf",
        "hf_read",
        "bridge",
        "transformer_impl",
        "model_class",
        "attention_backend",
        "bf16",
        "make_vocab_size_divisible_by",
        "share_prompts",
        "logprob_chunk_size",
    ),
    # Of a checkpoint that holds an adapter alone, whose base has moved.
    LoraConfig: ("pretrained_checkpoint",),
    ExpertsConfig: (
        "moe_router_dtype",
        "moe_token_dispatcher_type",
        "moe_flex_dispatcher_backend",
        "moe_grouped_gemm",
        "moe_permute_fusion",
    ),
    DataConfig: ("tokens_per_microbatch", "min_microbatches_per_stage"),
    ParallelConfig: (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "cp_comm_type",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "distributed_backend",
        "distributed_timeout_minutes",
    ),
    LoggingConfig: ("debug",),
}


def config_of(sections: Mapping[type, Any]) -> Config:
    """The configuration of a command with these flags, other fields as they are by default."""
    return Config(
        checkpoint=sections[CheckpointConfig],
        model=sections[ModelConfig],
        lora=sections[LoraConfig],
        experts=sections[ExpertsConfig],
        data=sections[DataConfig],
        parallel=sections[ParallelConfig],
        logging=sections[LoggingConfig],
    )
