"""A stand-in for NVIDIA's Megatron-Bridge, which needs CUDA: its interface over Megatron-Core's own specs and our mappings.

Like the package it has a provider that is a TransformerConfig whose fields ``finalize`` settles, loads weights in a hook, and
goes by the names of modules' classes when it exports. It takes Llamas under any name of ``architectures``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.runtime.groups import ProcessGroups

# Those of ``AutoMapping._MODULE_TYPE_REGISTRY`` that occur here.
_KNOWN_CLASSES = {"ColumnParallelLinear", "VocabParallelEmbedding", "RowParallelLinear", "RMSNorm"}


@dataclasses.dataclass
class Provider(TransformerConfig):
    """A model's TransformerConfig with fields of the model, hooks, and what builds it."""

    vocab_size: int | None = None
    seq_length: int = 1024
    should_pad_vocab: bool = False
    make_vocab_size_divisible_by: int = 128
    share_embeddings_and_output_weights: bool = True
    rotary_base: float = 10000

    def __post_init__(self) -> None:
        self.hooks: list[Any] = []
        self.finalized = False

    def register_pre_wrap_hook(self, hook: Any) -> None:
        self.hooks.append(hook)

    def finalize(self) -> None:
        super().__post_init__()
        self.finalized = True

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        wrap_with_ddp: bool = True,
        use_cpu_initialization: bool | None = False,
        mixed_precision_wrapper: Any = "Float16Module",
        pg_collection: Any = None,
    ) -> list[Any]:
        assert self.finalized
        assert not wrap_with_ddp
        assert mixed_precision_wrapper is None
        assert self.vocab_size is not None
        self.use_cpu_initialization = bool(use_cpu_initialization)
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        padded = padded_vocab_size(self.vocab_size, self.make_vocab_size_divisible_by, self.tensor_model_parallel_size)
        model = GPTModel(
            self,
            TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(self), layer_norm=RMSNorm),
            vocab_size=padded if self.should_pad_vocab else self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pg_collection.pp.rank() == 0,
            post_process=pg_collection.pp.rank() == pg_collection.pp.size() - 1,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,
            pg_collection=pg_collection,
        )
        models = [model]
        for hook in self.hooks:
            models = hook(models)
        if self.bf16:
            model.bfloat16()
        return models


class AutoBridge:
    def __init__(self, path: Path, arch: ModelArchitecture) -> None:
        self.path, self.arch = path, arch

    @classmethod
    def from_hf_pretrained(cls, path: str, **kwargs: Any) -> AutoBridge:
        config = json.loads((Path(path) / "config.json").read_text())
        config.pop("provider", None)
        if "gpt2" in path:
            listed = "\n".join(f"  * Model{number}ForCausalLM" for number in range(80))
            raise ValueError(f"\nno bridge for GPT2LMHeadModel\n\nSupported:\n{listed}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
            return cls(Path(path), read_architecture(Path(folder)))

    def to_megatron_provider(self, load_weights: bool = True) -> Provider:
        arch = self.arch
        provider = Provider(
            num_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            ffn_hidden_size=arch.ffn_hidden_size,
            num_attention_heads=arch.num_attention_heads,
            num_query_groups=arch.num_query_groups,
            kv_channels=arch.kv_channels,
            layernorm_epsilon=arch.layernorm_epsilon,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=True,
            # As configs of Hugging Face may have it.
            hidden_dropout=0.1,
            attention_dropout=0.1,
            moe_token_dispatcher_type="allgather",
            params_dtype=getattr(torch, arch.dtype),
            vocab_size=arch.vocab_size,
            seq_length=arch.max_position_embeddings,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            rotary_base=arch.ropes[0].base,
        )
        for name, value in json.loads((self.path / "config.json").read_text()).get("provider", {}).items():
            setattr(provider, name, value)
        if load_weights:
            provider.register_pre_wrap_hook(self._load)
        return provider

    def _load(self, models: list[Any]) -> list[Any]:
        load_hf_weights(models[0], self.path, self.arch, groups=ProcessGroups.of_megatron())
        return models

    def save_hf_pretrained(self, model: list[Any], path: str, show_progress: bool = True) -> None:
        (policy,) = model
        holders = {type(module).__name__ for module in policy.modules() if list(module.parameters(recurse=False))}
        if unknown := holders - _KNOWN_CLASSES:
            raise ValueError(f"Cannot determine parallelism type for module '{min(unknown)}'")
        export_hf(policy, self.arch, self.path, Path(path), dtype=None, groups=ProcessGroups.of_megatron())


def install_stand_in() -> None:
    """Make it importable as ``megatron.bridge``, in this process."""
    module: Any = ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge
    sys.modules["megatron.bridge"] = module
