"""Fields of a Hugging Face config that say nothing about what the model computes from given tokens."""

from __future__ import annotations

# What transformers and those who train with it write beside the model: identity, tokens, labels.
_ABOUT_THE_FILE = (
    *("_name_or_path", "_commit_hash", "_from_model_config", "model_type", "transformers_version", "auto_map", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
    *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels"),
    *("model_max_length", "tokenizer_model_max_length", "max_sequence_length", "trust_remote_code", "transformers.js_config"),
    *("unsloth_version", "unsloth_fixed", "is_llama_config", "neftune_noise_alpha"),
)
# How it is run, started or cut; pretraining_tp computes the same in slices.
_ABOUT_THE_RUN = (
    *("initializer_range", "use_cache", "pretraining_tp", "chunk_size_feed_forward", "pruned_heads", "is_decoder"),
    *("return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
    *("torchscript", "tf_legacy_loss", "use_bfloat16", "_attn_implementation", "_attn_implementation_autoset"),
    *("attn_implementation", "_flash_attn_2_enabled", "use_flash_attention", "keys_to_ignore_at_inference"),
)
# How text is drawn from it, which older configs say here.
_ABOUT_GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
)
# What a mixture of experts is trained with besides, by others.
_ABOUT_ROUTERS = ("output_router_logits", "router_jitter_noise")

HARMLESS_FIELDS = frozenset((*_ABOUT_THE_FILE, *_ABOUT_THE_RUN, *_ABOUT_GENERATION, *_ABOUT_ROUTERS))
