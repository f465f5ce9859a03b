"""The arguments that other programs read from a checkpoint: all that they ask for, and what cannot be said is told."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch

from megatron_rmipo.checkpoint.megatron.megatron_lm_args import BEYOND_KEY, beyond_megatron_lm, common_of_model
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from tests.checkpoint.models import KINDS, MODEL_TYPES, write_hf_model

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"
# What Megatron-Bridge 0.6.2 reads without a default (training/mlm_compat/arguments.py and model.py), and Megatron-SWIFT 4.6
# (megatron/utils/megatron_lm_utils.py).
BRIDGE = """
    multi_latent_attention heterogeneous_layers_config_path no_persist_layer_norm params_dtype overlap_p2p_comm num_experts
    rotary_interleaved decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers fp8_param_gather swiglu
    bias_swiglu_fusion bias_gelu_fusion squared_relu init_method_xavier_uniform group_query_attention num_query_groups
    config_logger_dir cp_comm_type
    is_hybrid_model moe_grouped_gemm qk_layernorm qk_l2_norm normalization transformer_impl mtp_num_layers padded_vocab_size
    max_position_embeddings fp16_lm_cross_entropy untie_embeddings_and_output_weights position_embedding_type rotary_percent
    rotary_base use_rope_scaling init_model_with_meta_device fp16 bf16 make_vocab_size_divisible_by spec
"""
SWIFT = "tensor_model_parallel_size pipeline_model_parallel_size no_save_optim no_save_rng consumed_train_samples"


def architecture(folder: Path, kind: str) -> ModelArchitecture:
    return read_architecture(write_hf_model(folder / kind, kind))


@pytest.mark.parametrize("kind", ["llama_biases", "gpt_oss", "deepseek_v2"])
def test_readers_find_what_they_ask_for_in_values_that_load_without_code(tmp_path: Path, kind: str) -> None:
    run = {"tensor_model_parallel_size": 2, "consumed_train_samples": 12, "no_save_optim": False}
    arch = architecture(tmp_path, kind)
    common = common_of_model(arch, 7, dtype=torch.bfloat16, tokenizer=tmp_path / "hf", run=run)
    stream = io.BytesIO()
    torch.save(common, stream)
    stream.seek(0)
    # As Megatron-Core does when it is imported; for good, since taking it back would take Megatron's away, too.
    torch.serialization.add_safe_globals([argparse.Namespace])
    found = torch.load(stream, weights_only=True)
    assert found == common
    assert (found["checkpoint_version"], found["iteration"]) == (3.0, 7)
    args = found["args"]
    assert [name for name in (BRIDGE + SWIFT).split() if not hasattr(args, name)] == []
    # 203 tokens, over two ranks in multiples of 128.
    assert (args.vocab_size, args.padded_vocab_size, args.params_dtype, args.bf16) == (203, 256, torch.bfloat16, True)
    assert (args.tensor_model_parallel_size, args.consumed_train_samples, args.no_save_optim) == (2, 12, False)
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", str(tmp_path / "hf"))
    assert args.swiglu == (kind != "gpt_oss")
    assert args.add_bias_linear == (kind != "deepseek_v2")


def test_docs_list_what_arguments_cannot_say(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {}
    for kind in KINDS:
        for what in beyond_megatron_lm(architecture(tmp_path, kind)):
            found.setdefault(what, set()).add(MODEL_TYPES[kind].removesuffix("_text"))
    section = DOCS.read_text(encoding="utf-8").split("## Checkpoints of other programs")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]*`[^|]*) \|$", section, re.MULTILINE)
    assert {what: set(re.findall(r"`(\w+)`", families)) for what, families in rows} == found


def test_of_a_model_of_no_family_sizes_alone_are_told(tmp_path: Path) -> None:
    known = dataclasses.asdict(architecture(tmp_path, "llama2")) | {"ropes": (), "layer_kinds": ()}
    common = common_of_model(
        ForeignArchitecture(**known, layer_matrices=1, layer_vectors=1), 3, dtype=torch.float32, tokenizer=None, run={}
    )
    assert common["args"].hidden_size == 48
    assert common[BEYOND_KEY] == ["what it computes: it was built by another package, and its sizes alone are known"]
    assert not hasattr(common["args"], "swiglu")
