"""What an unknown flag is answered with: ours of that meaning, why there is none, or the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from megatron_rmipo.config.values import ValueType

_BATCH = (
    "use --global-batch-size, the pairs of a step over all ranks (batch per device x accumulation x devices); micro-batches are "
    "filled up to --tokens-per-microbatch tokens"
)
_SHARDING = "the model is sharded by --tensor-model-parallel-size, --pipeline-model-parallel-size and --use-distributed-optimizer"
_TOKENIZER = "the tokenizer comes with the model (--load-hf, --load) and is checked against the data's"
_ARCHITECTURE = "the architecture comes with the model (--load-hf, --load)"
_PREPARED = "prepare the data with tools/preprocess_preferences.py and use --data-path PREFIX"
_KERNELS = "kernels are chosen by --transformer-impl and --attention-backend"
_PACKED = "pairs are packed without padding up to --tokens-per-microbatch tokens, always"
_LENGTH = "use --seq-length, here and in tools/preprocess_preferences.py, which shortens or leaves out what is longer"

# Flags of Hugging Face's trainers and of Megatron-LM that people bring along: what they are told -> the names.
_ANSWERS = {
    # Hugging Face: the run
    "use --load-hf DIR": "model_name_or_path model_name model",
    "use --reference-hf DIR, or --reference-load DIR for a checkpoint": "ref_model_name_or_path ref_model ref_load",
    "use --save DIR for checkpoints and --save-hf DIR for the Hugging Face model": "output_dir",
    "use --load DIR": "resume_from_checkpoint",
    "use --objective NAME; python -m megatron_rmipo.objectives lists them": "loss_type rl_algorithm rlhf_type",
    "write weights behind the names: --objective dpo:0.8,sft:0.2": "loss_weights",
    "use --lr": "learning_rate",
    "use --epochs": "num_train_epochs num_epochs max_epochs",
    "use --train-iters": "max_steps",
    "use --lr-warmup-fraction": "warmup_ratio",
    "use --lr-warmup-iters": "warmup_steps",
    "use --lr-decay-style": "lr_scheduler_type",
    "use --adam-eps": "adam_epsilon",
    "use --clip-grad": "max_grad_norm",
    "use --seed": "data_seed",
    "use --optimizer adam, which is AdamW": "optim",
    "use --gamma-beta-ratio, the margin in units of beta": "simpo_gamma",
    "use --sft-weight": "cpo_alpha rpo_alpha",
    _BATCH: "per_device_train_batch_size gradient_accumulation_steps train_batch_size batch_size micro_batch_size",
    "evaluation runs in batches of --global-batch-size": "per_device_eval_batch_size eval_batch_size",
    _LENGTH: "max_length max_seq_length max_seq_len max_completion_length max_target_length max_prompt_length",
    "use --bf16; without it everything is fp32": "fp16 torch_dtype dtype params_dtype bf16_full_eval",
    "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "gradient_checkpointing",
    _SHARDING: "deepspeed deepspeed_config fsdp fsdp_config use_torch_fsdp2 zero_stage",
    "start ranks with torchrun, which tells each its number": "local_rank local_process_index",
    "of torchrun, and stands before -m megatron_rmipo.train": (
        "nproc_per_node nnodes node_rank max_restarts master_addr master_port rdzv_backend rdzv_endpoint rdzv_id standalone"
    ),
    "use --distributed-timeout-minutes": "ddp_timeout",
    "use --distributed-backend": "ddp_backend",
    # Hugging Face, Megatron-Bridge: adapters
    "use --lora-rank N, which trains an adapter": (
        "use_peft use_lora lora_r lora_dim train_type tuner_type finetuning_type peft peft_scheme peft_type"
    ),
    "use --lora-target-modules": "lora_target target_modules",
    "experts have adapters by --lora-target-modules all-linear, or by their names": "target_parameters lora_target_parameters",
    "use --lora-target-regex, which a module's whole name has to match, such as '(?!.*down_proj).*'": (
        "target_regex exclude_modules lora_exclude_modules layers_to_transform layers_pattern"
    ),
    "use --lora-modules-to-save": "modules_to_save additional_target",
    "use --lora-plus-ratio": "lora_plus_lr_ratio loraplus_lr_ratio lorap_lr_ratio lora_lr_ratio",
    "use --use-rslora": "use_rs_lora lora_use_rslora",
    "all projections get one rank and one alpha; the adapter of --load-adapter keeps its own": "rank_pattern alpha_pattern",
    "A is drawn as PEFT draws it and B is zero, always": (
        "init_lora_weights lora_init init_weights lora_A_init_method lora_B_init_method lora_A_init lora_B_init pissa_init "
        "pissa_iter"
    ),
    "an adapter is of factors alone; no bias is trained": "lora_bias",
    "an adapter is fp32, whatever the model is": "lora_dtype autocast_adapter_dtype",
    "an adapter is that of a causal language model": "lora_task_type",
    "only --lora-rank and --load-adapter freeze weights, all but the adapter's and --lora-modules-to-save": (
        "freeze_parameters freeze_parameters_ratio trainable_parameters freeze_llm freeze_base_model"
    ),
    "use --save-adapter DIR for the adapter and --save-hf DIR for the model that it is merged into; or tools/merge_adapter.py": (
        "merge_lora merge_adapter export_adapter"
    ),
    "use --load-hf DIR of the first adapter, which is merged, and --lora-rank N": "create_new_adapter",
    "use --load-adapter DIR, or --load DIR to go on with a run": (
        "adapter_name_or_path adapters adapter_load adapter_load_dir adapter_path lora_adapter lora_adapter_path lora_path"
    ),
    "use --reference-adapter DIR": "ref_adapter_name ref_adapters ref_adapter_load ref_model_adapters",
    "there is one adapter that is trained, and its name is not asked for": "model_adapter_name adapter_name",
    "the reference is the model without its adapter; another is named with --reference-hf or --reference-adapter": (
        "force_use_ref_model"
    ),
    "use --quantize-base nf4": (
        "load_in_4bit quant_bits quantization_bit use_bnb_nested_quant bnb_4bit_quant_type bnb_4bit_quant_storage use_qlora qlora"
    ),
    "use --quantize-base int8": "load_in_8bit",
    "the reference's log-probs are computed once and kept, always": "precompute_ref_log_probs precompute_ref_batch_size",
    # Hugging Face: data, evaluation, logging
    _PREPARED: "dataset_name dataset dataset_mixer train_file dataset_config mock_data data_cache_path train_data_path",
    "name the split to tools/preprocess_preferences.py, which prepares the data": "dataset_train_split dataset_split",
    "prepare held-out data too and use --valid-data-path PREFIX, or --split 99,1": (
        "validation_file dataset_test_split eval_dataset test_data_path test_file"
    ),
    "use --num-workers here, --workers in tools/preprocess_preferences.py": "dataloader_num_workers dataset_num_proc",
    "use --log-interval": "logging_steps logging_strategy",
    "use --log-dir, or --tensorboard-dir": "logging_dir",
    "use --save-interval": "save_steps save_strategy",
    "use --keep-last": "save_total_limit",
    "use --eval-interval": "eval_steps eval_strategy evaluation_strategy",
    "use --eval-pairs": "eval_iters max_eval_samples",
    "use --tensorboard-dir DIR or --wandb-project NAME": "report_to",
    "use --wandb-exp-name": "run_name",
    "a run always trains, and evaluates where there are held-out pairs": "do_train do_eval do_predict",
    "a run that is to start anew is given another --save": "overwrite_output_dir",
    "a run sends nothing; --save-hf writes the model, and tools/push_to_hub.py sends it": "push_to_hub hub_model_id hub_token",
    "code of a model's repository is never run": "trust_remote_code",
    _TOKENIZER: "tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer_model vocab_file merge_file",
    # Megatron-LM
    _ARCHITECTURE: (
        "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels num_query_groups group_query_attention "
        "max_position_embeddings position_embedding_type use_rotary_position_embeddings rotary_base rotary_percent normalization "
        "norm_epsilon swiglu disable_bias_linear add_qkv_bias untie_embeddings_and_output_weights init_method_std vocab_size "
        "use_checkpoint_args use_mcore_models num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk "
        "moe_router_pre_softmax moe_router_score_function moe_router_enable_expert_bias moe_router_num_groups "
        "moe_router_group_topk moe_router_topk_scaling_factor moe_shared_expert_intermediate_size"
    ),
    "use --moe-token-dispatcher-type flex": "moe_enable_deepep",
    "the load-balancing loss is that of the global batch, always": "moe_router_load_balancing_type",
    "no token is dropped": "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy",
    "not supported yet": "rampup_batch_size",
    "not supported, checkpoints and exports do not know its shards (docs/training.md, Less memory); "
    "--use-distributed-optimizer shards the optimizer": (
        "use_megatron_fsdp data_parallel_sharding_strategy use_custom_fsdp outer_dp_sharding_strategy init_model_with_meta_device"
    ),
    "on the host torch's AdamW updates, always": "use_torch_optimizer_for_cpu_offload",
    "gradients are reduced in --main-grads-dtype, in which they are summed": (
        "grad_reduce_in_bf16 accumulate_allreduce_grads_in_fp32"
    ),
    "use --epochs or --train-iters": "train_samples",
    "use --lr-warmup-iters or --lr-warmup-fraction": "lr_warmup_samples",
    "the decay ends with the run": "lr_decay_iters lr_decay_samples",
    "there is no dropout": "attention_dropout hidden_dropout disable_dropout dropout_position",
    "the reference stays as it is": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "longer pairs are dealt with by --overlong of tools/preprocess_preferences.py": "truncation_mode",
    "use --recompute-granularity selective": "recompute_activations",
    "SIGTERM and SIGINT save and end a run, always": "exit_signal_handler",
    "each rank writes and reads its share of a checkpoint, always, and any layout can load it": (
        "ckpt_fully_parallel_save ckpt_fully_parallel_load dist_ckpt_optim_fully_reshardable ckpt_assume_constant_structure"
    ),
    "use --exit-interval": "exit_duration_in_mins",
    "throughput is always logged": "log_throughput",
    "metrics.jsonl has the seconds of a step's parts; --profile writes a trace": "timing_log_level timing_log_option",
    "TensorBoard gets what metrics.jsonl gets; use --log-interval": "tensorboard_log_interval",
    _KERNELS: (
        "attn_implementation use_flash_attn use_flash_attention_2 use_liger_kernel use_fused_rmsnorm torch_compile "
        "cross_entropy_loss_fusion no_masked_softmax_fusion no_bias_gelu_fusion no_bias_swiglu_fusion no_bias_dropout_fusion "
        "no_rope_fusion no_gradient_accumulation_fusion"
    ),
    _PACKED: (
        "packing padding_free padding reset_position_ids reset_attention_mask eod_mask_loss dataloader_type variable_seq_lengths"
    ),
}
_INSTEAD = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}


def flag_of(key: str) -> str:
    """``lr_decay_style`` -> ``--lr-decay-style``."""
    return "--" + key.replace("_", "-")


def describe_unknown_flag(token: str, flags: Mapping[str, ValueType]) -> str:
    """The fault of a token of the command line that looks like a flag and is none."""
    flag = token.partition("=")[0]
    return f"{flag}: {describe_unknown(flag.lstrip('-').replace('-', '_'), flags)}"


def describe_unknown_key(source: str, key: str, flags: Mapping[str, ValueType]) -> str:
    """The fault of an entry of a file, found at ``source``; the file may come from another version."""
    return f"{source}: {describe_unknown(key, flags)}; or remove the line, if another version wrote the file"


def describe_unknown(key: str, flags: Mapping[str, ValueType]) -> str:
    """What is said of a name that is no flag.

    Args:
        key: the name, with underscores.
        flags: name -> value type of the flags that there are.
    """
    if key in _INSTEAD:
        return f"not a flag here: {_INSTEAD[key]}"
    if f"no_{key}" in flags:
        return f"that is the default; {flag_of(f'no_{key}')} turns it off"
    positive = key.removeprefix("no_")
    if positive != key and positive in flags:
        if flags[positive].base is bool:
            return f"the switch is {flag_of(positive)}; leave it out, or set {positive}: false in the file"
        return f"{flag_of(positive)} takes a value and is no switch; leave it out for its default"
    nearest = difflib.get_close_matches(positive, flags, n=1)
    return f"unknown flag; did you mean {flag_of(nearest[0])}?" if nearest else "unknown flag; see --help"
