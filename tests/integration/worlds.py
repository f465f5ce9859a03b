"""What one rank does in the multi-process tests: build the policy at a layout, run the passes, give back loss and gradients."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import stage_shares
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.pipeline_bubble import Stages
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import stored_tensors
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.model.problems.experts import experts_cross_replicas
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.rows import from_last_stage, gather_pairs, score_responses
from megatron_rmipo.passes.step_passes import gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state
from tests.integration.problem import BOS


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout and cut of the same global batch."""

    name: str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    tokens_per_microbatch: int = 10_000
    share_prompts: bool = True
    recompute: str | None = None
    distributed_optimizer: bool = False
    overlap: bool = False
    instances: int = 1
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    bf16: bool = False
    min_packs_per_stage: int = 0
    objective: str = "rmipo"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = "llama"
    model_class: Literal["gpt", "hybrid"] = "gpt"
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocab_multiple: int = 8

    def layout(self) -> dict[str, int | None]:
        """What the process groups are made of."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "num_distributed_optimizer_instances": self.instances,
        }

    def config(self) -> Config:
        recompute: dict[str, Any] = {"recompute_granularity": self.recompute}
        if self.recompute == "full":
            recompute.update(recompute_method="uniform", recompute_num_layers=1)
        return Config(
            parallel=ParallelConfig(
                **self.layout(),  # type: ignore[arg-type]
                cp_comm_type=self.cp_comm_type,
                **self.split,
                sequence_parallel=self.sequence_parallel,
                use_distributed_optimizer=self.distributed_optimizer,
                overlap_grad_reduce=self.overlap,
                overlap_param_gather=self.overlap and self.distributed_optimizer,
            ),
            model=ModelConfig(
                model_class=self.model_class,
                make_vocab_size_divisible_by=self.vocab_multiple,
                logprob_chunk_size=7,
                bf16=self.bf16,
                **recompute,
            ),
            memory=MemoryConfig(**self.memory),
            optimizer=OptimizerConfig(lr=1e-3, lr_decay_style="constant"),
        )


def build_state(case: Case, hf_dir: Path, groups: ProcessGroups, config: Config | None = None) -> TrainingState:
    """The policy with the Hugging Face weights, wrapped for training, by the case's configuration or another."""
    arch, config = read_architecture(hf_dir), config or case.config()
    policy = build_model(arch, config, groups)
    load_hf_weights(policy, hf_dir, arch, groups=groups)
    return build_training_state(policy, config, groups, train_iters=10)


def build_batches(case: Case, pairs: PairCollection, policy: Policy, groups: ProcessGroups) -> BatchBuilder:
    needs = build_objective(case.objective, case.options).needs
    layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        tokens_per_microbatch=case.tokens_per_microbatch,
        cost=forward_cost_model(policy.architecture),
        share_prompts=case.share_prompts,
        with_rejected=needs.rejected,
        unconditional=needs.unconditional,
        bos_token_id=BOS,
        columns=needs.columns,
        multiple_of=case.cp * (case.tp if case.sequence_parallel else 1),
        equal_packs=experts_cross_replicas(case.config().parallel),
        stages=Stages(stage_shares(policy.architecture.num_layers, case.config().parallel)),
        min_packs_per_stage=case.min_packs_per_stage,
    )
    return BatchBuilder(pairs, layout)


def build_reference(case: Case, reference_dir: Path, groups: ProcessGroups) -> Policy:
    """The frozen reference at the case's layout."""
    arch = read_architecture(reference_dir)
    reference = build_model(arch, case.config(), groups)
    load_hf_weights(reference, reference_dir, arch, groups=groups)
    return reference.requires_grad_(False).eval()


@torch.no_grad()
def score_all(case: Case, reference: Policy, pairs: PairCollection, groups: ProcessGroups) -> list[Any]:
    """The log-probs of all pairs under the reference by the product's own pass: of the one data set, fp32 ``[P, 2]``."""
    batch = build_batches(case, pairs, reference, groups).build(np.arange(len(pairs)))
    scores = score_responses(reference, batch.conditional, batch.num_pairs)
    if groups.is_last_stage:
        scores = gather_pairs(scores, groups)
    return [from_last_stage(scores, groups)[:, :, 0].numpy()]


class ReferenceScores:
    """Log-probs under the reference, computed once at a layout for all the cases that read them.

    Args:
        reference_dir: the reference.
        groups: of the layout.
    """

    def __init__(self, reference_dir: str, groups: ProcessGroups) -> None:
        self.reference_dir, self.groups = Path(reference_dir), groups
        self.scores: dict[str, list[Any]] = {}

    def of(self, name: str, case: Case, pairs: PairCollection) -> list[Any]:
        """The scores of the pairs that go by this name; collective where they are not there yet."""
        if name not in self.scores:
            reference = build_reference(case, self.reference_dir, self.groups)
            self.scores[name] = score_all(case, reference, pairs, self.groups)
        return self.scores[name]


def loss_and_gradients(case: Case, hf_dir: str, pairs: PairCollection, scores: ReferenceScores) -> dict[str, Any] | None:
    """The global batch's loss, metrics and gradients by Hugging Face name; None except on the rank that has them all."""
    objective, groups = build_objective(case.objective, case.options), scores.groups
    needs, reference = objective.needs, None
    if needs.perturbation is not None:
        reference = build_reference(case, scores.reference_dir, groups)
    if needs.reference:
        pairs.reference_scores = scores.of("pairs", case, pairs)
        if needs.mismatched:
            pairs.match_anew()
            assert pairs.mismatched is not None
            pairs.mismatched.reference_scores = scores.of("mismatched", case, pairs.mismatched)
    state = build_state(case, Path(hf_dir), groups)
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
    pairs.reference_scores = pairs.mismatched = None
    state.model.zero_grad_buffer()
    state.model.eval()
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups, reference)
    state.model.train()
    metrics = gradient_pass(state.model, batch, objective, prepared, groups)
    state.optimizer.prepare_grads()
    norm = float(state.optimizer.get_grad_norm())
    if case.distributed_optimizer:
        for chunk in state.model.chunks:
            gather_shares(chunk)
    gradients = gather_gradients(state.policy, state.policy.architecture, Path(hf_dir), groups)
    num_packs = len(batch.conditional)
    if gradients is None:
        return None
    return {
        "loss": metrics.values["loss"].double().mean().item(),
        "metrics": metrics.values,
        "gradients": gradients,
        "norm": norm,
        "packs": num_packs,
    }


def gather_shares(chunk: DistributedDataParallel) -> None:
    """Each rank has reduced its share of the gradients; give all of them all."""
    for same in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        group = same.intra_distributed_optimizer_instance_group
        for bucket in same.buckets:
            share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def gather_gradients(
    model: torch.nn.Module, arch: ModelArchitecture, hf_dir: Path, groups: ProcessGroups
) -> dict[str, Tensor] | None:
    """Gradients as if they were weights of a Hugging Face checkpoint: the exporter puts shards and stages together."""
    for parameter in model.parameters():
        parameter.data = parameter.main_grad.to(torch.float32)  # type: ignore[attr-defined]
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    out = Path(folder[0]) / "gradients"
    export_hf(model, arch, hf_dir, out, dtype=torch.float32, groups=groups)
    if groups.rank != 0:
        return None
    gradients = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    shutil.rmtree(folder[0])
    # Score biases of experts are no parameters.
    learned = {name for name, (rule, _) in stored_tensors(arch).items() if not rule.is_buffer}
    return {name: gradient for name, gradient in gradients.items() if name in learned}


def end_case() -> None:
    """End Megatron's groups, so that the next case of this process makes its own; torch.distributed goes on."""
    dist.barrier()
    parallel_state.destroy_model_parallel()


Result = dict[str, Any] | None


def run_cases(cases: list[Case], folder: str, pairs: PairCollection) -> list[Result]:
    """Loss and gradients of several cases.

    ``folder`` has each case's model and its reference in ``NAME/model`` and ``NAME/reference``.
    """
    scores: dict[tuple[str, str], ReferenceScores] = {}

    def compute(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> Result:
        reference = f"{folder}/{case.model}/reference"
        known = scores.setdefault((case.model, str(case.layout())), ReferenceScores(reference, groups))
        return loss_and_gradients(case, f"{folder}/{case.model}/model", pairs, known)

    return run_at_layouts(compute, cases, folder, pairs)


def run_at_layouts(
    compute: Callable[[Case, str, PairCollection, ProcessGroups], Result], cases: list[Case], folder: str, pairs: PairCollection
) -> list[Result]:
    """What ``compute`` gives for each case, one after the other in one set of processes, which are slow to start."""
    results: list[Result] = [None] * len(cases)
    layout_of = lambda number: str(cases[number].layout())  # noqa: E731
    # Layout by layout: gloo keeps the threads of every group that was ever made, and they keep a small machine busy.
    for _, same in itertools.groupby(sorted(range(len(cases)), key=layout_of), key=layout_of):
        numbers = list(same)
        groups = initialize_runtime(**cases[numbers[0]].layout())
        for number in numbers:
            results[number] = compute(cases[number], folder, pairs, groups)
        end_case()
    return results
