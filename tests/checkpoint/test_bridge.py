"""Models through Megatron-Bridge, of which a small stand-in has the interface: the package itself needs CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.bridge import build_bridged_policy
from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.integration import worlds
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case


class Provider:
    """Fields of a TransformerConfig and of a model, hooks, and what builds it, as providers of Megatron-Bridge have them."""

    def __init__(self, arch: ModelArchitecture) -> None:
        self.vocab_size, self.seq_length, self.should_pad_vocab = arch.vocab_size, 1024, False
        self.tensor_model_parallel_size = self.pipeline_model_parallel_size = 1
        self.expert_model_parallel_size, self.expert_tensor_parallel_size = 1, None
        self.sequence_parallel = self.bf16 = self.fp16 = self.calculate_per_token_loss = self.variable_seq_lengths = False
        self.params_dtype = self.pipeline_dtype = torch.bfloat16
        # As configs of Hugging Face may have it.
        self.hidden_dropout = self.attention_dropout = 0.1
        self.moe_token_dispatcher_type = "allgather"
        self._arch, self._finalized, self._hooks = arch, False, list[Any]()

    def register_pre_wrap_hook(self, hook: Any) -> None:
        self._hooks.append(hook)

    def finalize(self) -> None:
        self._finalized = True

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        wrap_with_ddp: bool = True,
        use_cpu_initialization: bool | None = False,
        mixed_precision_wrapper: Any = "Float16Module",
        pg_collection: Any = None,
    ) -> list[Any]:
        assert self._finalized
        assert not wrap_with_ddp
        assert mixed_precision_wrapper is None
        arch = self._arch
        fields = {name: value for name, value in vars(self).items() if name in TransformerConfig.__dataclass_fields__}
        config = TransformerConfig(
            **fields,
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
            use_cpu_initialization=use_cpu_initialization,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
            batch_p2p_comm=False,
        )
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        padded = padded_vocab_size(self.vocab_size, 128, self.tensor_model_parallel_size)
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm),
            vocab_size=padded if self.should_pad_vocab else self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pg_collection.pp.rank() == 0,
            post_process=pg_collection.pp.rank() == pg_collection.pp.size() - 1,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.ropes[0].base,
            pg_collection=pg_collection,
        )
        models = [model]
        for hook in self._hooks:
            models = hook(models)
        return models


class AutoBridge:
    # What the package reads from Megatron's parallel state.
    groups: ProcessGroups

    def __init__(self, path: str) -> None:
        self.path, self.arch = Path(path), read_architecture(Path(path))

    @classmethod
    def from_hf_pretrained(cls, path: str, **kwargs: Any) -> AutoBridge:
        if "gpt2" in path:
            raise ValueError("no bridge for GPT2LMHeadModel")
        return cls(path)

    def to_megatron_provider(self, load_weights: bool = True) -> Provider:
        provider = Provider(self.arch)
        if load_weights:
            provider.register_pre_wrap_hook(self._load)
        return provider

    def _load(self, models: list[Any]) -> list[Any]:
        load_hf_weights(models[0], self.path, self.arch, groups=self.groups)
        return models

    def save_hf_pretrained(self, model: list[Any], path: str, show_progress: bool = True) -> None:
        export_hf(model[0], self.arch, self.path, Path(path), dtype=None, groups=self.groups)


def install_stand_in() -> None:
    module: Any = ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge
    sys.modules["megatron.bridge"] = module


def score_and_export(cases: list[Case], folder: str, pairs: Any) -> list[Any]:
    """Each case with the policy built through the bridge: by the passes, the optimizer's wrapping and the export."""
    install_stand_in()

    def build(arch: ModelArchitecture, config: Config, groups: ProcessGroups) -> PolicyModel:
        parallel, AutoBridge.groups = config.parallel, groups
        hf_dir = Path(folder) / "llama" / "model"
        bridged = build_bridged_policy(hf_dir, groups, max_length=256, sequence_parallel=parallel.sequence_parallel, chunk_size=7)
        bridged.export(Path(folder) / f"exported-{parallel.tensor_model_parallel_size}")
        with pytest.raises(ConversionError, match="exists and holds something"):
            bridged.export(Path(folder) / f"exported-{parallel.tensor_model_parallel_size}")
        # The tests' own tools ask for it.
        bridged.policy.architecture = arch
        return bridged.policy

    worlds.build_model = build
    worlds.load_hf_weights = lambda *args, **kwargs: None
    return worlds.run_cases(cases, folder, pairs)


@pytest.mark.dist
def test_a_bridged_model_scores_trains_and_exports(tmp_path: Path) -> None:
    hf_dir = make_hf_model(tmp_path / "llama" / "model")
    pairs = make_pairs(9)
    problem = DenseProblem(hf_dir, hf_dir, pairs)
    cases = [
        Case("TP 2, sequence parallel", tp=2, sequence_parallel=True, objective="simpo", tokens_per_microbatch=120),
        Case("PP 2", pp=2, objective="simpo", tokens_per_microbatch=120),
    ]
    loss, gradients, _ = problem.answer(build_objective("simpo", {}))
    for result in run_distributed(score_and_export, 2, cases, str(tmp_path), collection(pairs))[0]:
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            error = (result["gradients"][name].double() - gradient).norm() / gradient.norm()
            assert error < 1e-4, (name, float(error))
    expected = load_file(hf_dir / "model.safetensors")
    for size in (1, 2):
        written = load_file(tmp_path / f"exported-{size}" / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.dist
def test_what_the_bridge_cannot_do_is_told(tmp_path: Path) -> None:
    hf_dir = make_hf_model(tmp_path / "model")
    run_distributed(refusals, 1, hf_dir)


def refusals(hf_dir: Path) -> None:
    groups = initialize_runtime()
    sys.modules["megatron.bridge"] = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Megatron-Bridge is not installed\. .* pip install megatron-bridge"):
        build_bridged_policy(hf_dir, groups, max_length=64)
    install_stand_in()
    AutoBridge.groups = groups
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        build_bridged_policy(hf_dir.parent, groups, max_length=64)
    other = hf_dir.parent / "gpt2"
    hf_dir.rename(other)
    with pytest.raises(ConversionError, match="does not take this model: no bridge for GPT2LMHeadModel"):
        build_bridged_policy(other, groups, max_length=64)
    other.rename(hf_dir)
    with pytest.raises(ConfigError, match="Provider has no field made_up, to be 3"):
        build_bridged_policy(hf_dir, groups, max_length=64, made_up=3)
    with pytest.raises(ConfigError, match=r"attention_dropout: dropout of 0\.2"):
        build_bridged_policy(hf_dir, groups, max_length=64, attention_dropout=0.2)
    shutdown_runtime()
