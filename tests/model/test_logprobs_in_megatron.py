"""Log-probs on a head that Megatron's own layers use, too, in the same step and under its own DDP: no use loses its gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers, vocab_parallel_cross_entropy
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.model.build import _block_spec
from megatron_rmipo.model.logprobs import linear_logprobs
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

ARCH = ModelArchitecture(
    family="llama",
    num_layers=1,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=22,
    max_position_embeddings=64,
    ropes=(Rope(1e4),),
    layernorm_epsilon=1e-5,
)
NUM_TOKENS, NUM_STEPS = 10, 3
LOGITS = ["logits"] * 4
MIXED = ["logits", "fused", "both", "fused twice"]


@dataclasses.dataclass(frozen=True)
class Setting:
    tied: bool = False
    # What Megatron's own linear layers do with apex on a GPU.
    fused_accumulation: bool = False
    # Gradients reduced and weights gathered beside the passes, by the distributed optimizer; each weight a bucket of its own.
    overlapped: bool = False


def fuse(inputs: Tensor, gradients: Tensor, main_grad: Tensor) -> None:
    main_grad.addmm_(gradients.t(), inputs)


def build(setting: Setting, groups: ProcessGroups) -> DistributedDataParallel:
    torch.manual_seed(3)
    overrides = {"gradient_accumulation_fusion": setting.fused_accumulation, "sequence_parallel": groups.tp_size > 1}
    config = transformer_config(ARCH, groups, **overrides)
    model = GPTModel(
        config,
        _block_spec(ARCH, config, "sdpa", None),
        vocab_size=ARCH.vocab_size,
        max_sequence_length=NUM_TOKENS,
        share_embeddings_and_output_weights=setting.tied,
        position_embedding_type="none",
        pg_collection=groups.megatron_collection(),
    )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=setting.overlapped,
        use_distributed_optimizer=setting.overlapped,
        overlap_param_gather=setting.overlapped,
        bucket_size=1,
    )
    return DistributedDataParallel(config, ddp_config, model)


def microbatch_loss(model: Any, kind: str, number: int, groups: ProcessGroups, *, gathered: bool) -> Tensor:
    """A weighted sum of log-probs of a row of tokens, its own on each data-parallel rank, by one way or several together."""
    generator = torch.Generator().manual_seed(10 * number + groups.dp_rank)
    tokens, target = torch.randint(ARCH.vocab_size, (2, 1, NUM_TOKENS), generator=generator)
    weights = torch.randn(NUM_TOKENS, generator=generator)
    hidden = model.embedding(tokens, torch.arange(NUM_TOKENS)[None])
    hidden = model.decoder(hidden, torch.tensor([[0, NUM_TOKENS, 0, 0]]))
    head = model.embedding.word_embeddings if model.share_embeddings_and_output_weights else model.output_layer

    def by_logits() -> Tensor:
        logits, _ = model.output_layer(hidden, weight=head.weight)
        return -vocab_parallel_cross_entropy(logits, target.t())[:, 0]

    def fused() -> Tensor:
        # As docs/training.md has it.
        whole, options = hidden, dict[str, Any]()
        if model.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=groups.tp)
            options = {"reduce_hidden_grad": False}
        options |= {"vocab_size": ARCH.vocab_size, "chunk_size": 4}
        if gathered:
            with pytest.raises(ConfigError, match=r"weight \[\d+, 12\] lies in a buffer .* hand over the module that holds it"):
                linear_logprobs(whole[:, 0], head.weight, target[0], groups.tp, **options)
        return linear_logprobs(whole[:, 0], head if gathered else head.weight, target[0], groups.tp, **options)

    uses = {"logits": [by_logits], "fused": [fused], "both": [by_logits, fused], "fused twice": [fused, fused]}[kind]
    return sum(((weights * use()).sum() for use in uses), torch.zeros(())) / len(uses)


def train(setting: Setting, kinds: list[str], groups: ProcessGroups) -> list[Tensor]:
    """Weights after three steps of Megatron's Adam; by eps of 1 what it does is about proportional to the gradients."""
    model = build(setting, groups)
    options = {"use_distributed_optimizer": setting.overlapped, "overlap_param_gather": setting.overlapped}
    config = OptimizerConfig(optimizer="adam", lr=1.0, adam_eps=1.0, weight_decay=0.0, clip_grad=0.0, **options)
    optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False, pg_collection=groups.megatron_collection())
    for step in range(NUM_STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for number, kind in enumerate(kinds):
            last = number == len(kinds) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = microbatch_loss(model.module, kind, len(kinds) * step + number, groups, gathered=setting.overlapped)
                loss.backward()
        finalize_model_grads([model], pg_collection=groups.megatron_collection())
        optimizer.step()
    if setting.overlapped:
        model.start_param_sync(force_sync=True)
    return [parameter.detach().clone() for parameter in model.parameters()]


def differences() -> dict[str, float]:
    """By setting, the largest difference from all micro-batches by logits, relative to what training changed of a weight."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=fuse)
    layers._grad_accum_fusion_available = True
    found = {}
    for tp_size in (1, 2):
        groups = initialize_runtime(tp_size)
        for tied in (False, True):
            before = [parameter.detach().clone() for parameter in build(Setting(tied), groups).parameters()]
            expected = train(Setting(tied), LOGITS, groups)
            for fused_accumulation, overlapped in itertools.product((False, True), (False, True)):
                setting = Setting(tied, fused_accumulation, overlapped)
                errors = [
                    float((ours - theirs).norm() / (theirs - start).norm())
                    for ours, theirs, start in zip(train(setting, MIXED, groups), expected, before, strict=True)
                ]
                found[f"TP {tp_size}, {setting}"] = max(errors)
        # The world stays: another one of these ranks could not meet at the same port.
        parallel_state.destroy_model_parallel()
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_every_use_of_the_head_keeps_its_gradient() -> None:
    """TP 2 and DP 2; the head tied or not; layers that accumulate in the buffer or not; overlapped communication or none."""
    for found in run_distributed(differences, 2):
        assert len(found) == 16
        assert {name: error for name, error in found.items() if not error < 2e-5} == {}
