"""Megatron-LM's own arguments, loader, model and saver (``megatron.training``, in megatron-core from 0.19 on), without a GPU."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator, unset_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, global_vars
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_rmipo.runtime.megatron_training import install_cpu_training
from tests.plugin.adapters.pretraining import WITHOUT_CUDA

# What it wants to be told beside how it computes without CUDA.
_FLAGS = """
    --no-bias-gelu-fusion --moe-token-dispatcher-type allgather --micro-batch-size 1 --seq-length 64
    --dist-ckpt-strictness raise_unexpected --save-interval 1
"""
# What --use-checkpoint-args leaves to further flags, of what the checkpoint's arguments say.
_LEFT_OUT = """
    layernorm_epsilon qk_layernorm window_size window_attn_skip_freq use_rope_scaling rotary_seq_len_interpolation_factor
    no_rope_freq softmax_type quick_geglu glu_linear_offset activation_func_clamp_value rotary_scaling_factor mscale
    mscale_all_dim yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    moe_shared_expert_gate moe_router_num_groups moe_router_group_topk moe_router_load_balancing_type multi_latent_attention
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
"""


def arguments_of(directory: Path, *flags: str) -> Namespace:
    """Megatron-LM's arguments as ``--load directory --use-checkpoint-args`` makes them, made global."""
    install_cpu_training()
    with _told_so((*WITHOUT_CUDA, *_FLAGS.split(), "--use-checkpoint-args", "--load", str(directory), *flags)):
        args, stored = checkpointing.load_args_from_checkpoint(parse_args())
        for name in _LEFT_OUT.split():
            if hasattr(stored, name):
                setattr(args, name, getattr(stored, name))
        validate_args(args)
    global_vars.unset_global_variables()
    global_vars.set_args(args)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, 1, 1, 1, False)
    checkpointing._CHECKPOINT_VERSION = None
    return args


def build_model(args: Namespace) -> Any:
    """This rank's part of the GPTModel that Megatron-LM builds of its arguments."""
    model = GPTModelBuilder(gpt_config_from_args(args)).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            # Its local layers, unlike Transformer Engine's, would call the norm before experts by the name of a dense layer's.
            layer.submodules_config = copy.copy(layer.submodules_config)
            keys = layer.submodules_config.sharded_state_dict_keys_map
            layer.submodules_config.sharded_state_dict_keys_map = {
                name: key for name, key in keys.items() if not name.startswith("pre_mlp_layernorm")
            }
    return model


def load(model: Any, optimizer: Any = None) -> int:
    """Its ``load_checkpoint``; the iteration."""
    with _told_so(()):
        iteration, _ = checkpointing.load_checkpoint([model], optimizer, None, strict=True)
    return int(iteration)


@torch.no_grad()
def logits_of(model: Any, token_ids: Tensor) -> Tensor:
    """fp32 ``[T, V]`` of one text, int64 ``[T]``, with the padding of the vocabulary."""
    length = token_ids.numel()
    behind = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    output: Tensor = model.eval()(token_ids[None], torch.arange(length)[None], behind)
    return output[0].float()


@contextlib.contextmanager
def _told_so(flags: tuple[str, ...]) -> Iterator[None]:
    """With these flags as the command's, and without what Megatron-LM prints."""
    told, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = told
