"""A run goes on at any pipeline: interleaved, uneven, none; at key/value heads that ranks share, and vocabularies padded anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.megatron.common_state import read_common
from megatron_rmipo.checkpoint.megatron.directory import checkpoint_path
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.training.setup import build_training_state
from tests.checkpoint.megatron.test_store_experts import BEFORE, take_steps, tensors
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed
from tests.integration.worlds import end_case


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run stands, and which of the checkpoints it goes on from; None starts it."""

    name: str
    of: str | None
    vocab_multiple: int
    tp: int = 1
    pp: int = 1
    split: dict[str, Any] = dataclasses.field(default_factory=dict)


LAST_OF_ONE = {"decoder_last_pipeline_num_layers": 1}
LAYOUTS = [
    Layout("interleaved", None, 8, pp=2, split={"num_layers_per_virtual_pipeline_stage": 1}),
    Layout("uneven", "interleaved", 1, pp=2, split=LAST_OF_ONE),
    Layout("replicas", "uneven", 128),
    Layout("interleaved again", "replicas", 7, pp=2, split={"num_virtual_stages_per_pipeline_rank": 2}),
    Layout("a key/value head for two ranks", "interleaved again", 1, tp=2),
    Layout("even", "a key/value head for two ranks", 3, pp=2),
]


def train(hf: Path, folder: Path) -> dict[str, Any]:
    """At each layout some steps, a checkpoint and an export; what the first says of itself."""
    for layout in LAYOUTS:
        groups = initialize_runtime(layout.tp, layout.pp)
        for distributed in (True, False):
            parallel = ParallelConfig(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                sequence_parallel=layout.tp > 1,
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=distributed,
                overlap_param_gather=distributed,
                **layout.split,
            )
            config = Config(
                parallel=parallel,
                model=ModelConfig(make_vocab_size_divisible_by=layout.vocab_multiple),
                optimizer=OptimizerConfig(lr=1e-2, lr_decay_style="constant", clip_grad=0.0, weight_decay=0.1),
            )
            policy = build_model(read_architecture(hf), config, groups)
            load_hf_weights(policy, hf, policy.architecture, groups=groups)
            state = build_training_state(policy, config, groups, train_iters=100)
            stored: dict[str, Any] = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler}
            if layout.of is not None:
                load_checkpoint(folder / f"{layout.of}-{distributed}", **stored, load_rng=True, groups=groups)
            take_steps(state, BEFORE)
            state.gather_parameters()
            save_checkpoint(
                folder / f"{layout.name}-{distributed}",
                BEFORE,
                **stored,
                groups=groups,
                train_state={},
                config=config.to_flat_dict(),
                assets_dir=hf,
            )
            export = folder / f"{layout.name}-{distributed}-hf"
            export_hf(policy, policy.architecture, hf, export, dtype=None, groups=groups)
        end_case()
    arguments = read_common(checkpoint_path(folder / "interleaved-True", BEFORE))["args"]
    return dict(vars(arguments))


def one_rank(hf: Path, folder: Path) -> None:
    """As many steps by a run that stays on one rank."""
    groups = initialize_runtime()
    config = Config(optimizer=OptimizerConfig(lr=1e-2, lr_decay_style="constant", clip_grad=0.0, weight_decay=0.1))
    policy = build_model(read_architecture(hf), config, groups)
    load_hf_weights(policy, hf, policy.architecture, groups=groups)
    state = build_training_state(policy, config, groups, train_iters=100)
    for layout in LAYOUTS:
        take_steps(state, BEFORE)
        export_hf(policy, policy.architecture, hf, folder / f"{layout.name}-alone", dtype=None, groups=groups)


@pytest.mark.dist
@pytest.mark.slow
def test_training_goes_on_at_other_pipelines(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen3_moe", num_key_value_heads=1)
    run_distributed(one_rank, 1, hf, tmp_path)
    arguments, _ = run_distributed(train, 2, hf, tmp_path)
    # What Megatron-LM calls the layout.
    assert arguments["virtual_pipeline_model_parallel_size"] == 2
    assert arguments["pipeline_model_parallel_size"] == 2
    assert arguments["decoder_last_pipeline_num_layers"] is None
    for layout in LAYOUTS:
        expected = tensors(tmp_path / f"{layout.name}-alone")
        assert not torch.equal(expected["model.embed_tokens.weight"], tensors(hf)["model.embed_tokens.weight"])
        for distributed in (True, False):
            found = tensors(tmp_path / f"{layout.name}-{distributed}-hf")
            assert found.keys() == expected.keys()
            different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
            assert not different, (layout.name, distributed, different)
