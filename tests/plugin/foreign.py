"""What a rank does in tests of other people's loops: a GPTModel by Megatron's own spec, attached or not, in a bare schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.adopt import attach_model
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.rows import from_last_stage
from megatron_rmipo.plugin.batches import PreferenceBatches, preference_batches
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.integration.problem import BOS
from tests.integration.worlds import Case, ReferenceScores, gather_gradients, run_at_layouts


@dataclasses.dataclass(frozen=True)
class ForeignCase(Case):
    """A layout of ranks, and how a foreign loop is fed.

    Attributes:
        num_microbatches: of a step on each rank.
        before_step: passes run before the schedule starts.
        padded: the model is not attached, and takes padded rows.
        pad_to: their length, and none of the pipeline's shapes varies.
        seed_apart: how far apart the seeds of ranks are that were started with different ones.
    """

    num_microbatches: int = 5
    before_step: bool = False
    padded: bool = False
    pad_to: int | None = None
    seed_apart: int = 0


def build_llama(
    arch: ModelArchitecture,
    groups: ProcessGroups,
    *,
    sequence_parallel: bool = False,
    fixed_shape: bool = False,
    vp_stage: int | None = None,
    **changes: Any,
) -> GPTModel:
    """This rank's part of a Llama as a user of megatron-core builds it, without anything of ours; a chunk, with ``vp_stage``."""
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=arch.layernorm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=groups.pp_size > 1 and not fixed_shape,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        **changes,
    )
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    # torch's own norm refuses sequence parallelism.
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    return GPTModel(
        config,
        TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm),
        padded_vocab_size(arch.vocab_size, 8, groups.tp_size),
        arch.max_position_embeddings,
        pre_process=groups.is_first_stage and vp_stage in (None, 0),
        post_process=groups.is_last_stage and vp_stage in (None, last_chunk),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(arch.ropes[0].base),
    )


@dataclasses.dataclass
class Foreign:
    """A model in Megatron's wrapper for data parallelism, and what its loop is told.

    Attributes:
        model: as schedules take it.
        arch: what it is.
        groups: of this rank.
    """

    model: DistributedDataParallel
    arch: ModelArchitecture
    groups: ProcessGroups


def build_foreign(
    case: Case, hf_dir: Path, groups: ProcessGroups, *, attached: bool = True, fixed_shape: bool = False
) -> Foreign:
    """The Hugging Face model as a plain GPTModel in DDP, attached or as it is."""
    arch = read_architecture(hf_dir)
    inner = build_llama(arch, groups, sequence_parallel=case.sequence_parallel, fixed_shape=fixed_shape)
    load_hf_weights(inner, hf_dir, arch, groups=groups)
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
    if attached:
        attach_model(model, vocab_size=arch.vocab_size)
    inner.config.finalize_model_grads_func = finalize_model_grads
    return Foreign(model, arch, groups)


def run_schedule(
    foreign: Foreign, step: PreferenceStep, batches: PreferenceBatches, *, num_microbatches: int, forward_only: bool = False
) -> Any:
    """Forward and backward of a step by Megatron's schedule, as any loop does it; what it gives back."""
    tokens = batches.peek().conditional[0].token_ids
    foreign.model.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches,
        model=[foreign.model],
        num_microbatches=num_microbatches,
        seq_length=tokens.shape[-1],
        micro_batch_size=tokens.numel() // tokens.shape[-1],
        forward_only=forward_only,
    )


def loss_and_gradients(case: ForeignCase, hf_dir: str, pairs: PairCollection, scores: ReferenceScores) -> dict[str, Any] | None:
    """The global batch's loss, metrics and gradients in a foreign loop; None except on the rank that has them all."""
    objective, groups = build_objective(case.objective, case.options), scores.groups
    needs = objective.needs
    if needs.reference:
        pairs.reference_scores = scores.of("pairs", case, pairs)
    if needs.mismatched:
        pairs.match_anew()
        assert pairs.mismatched is not None
        pairs.mismatched.reference_scores = scores.of("mismatched", case, pairs.mismatched)
    foreign = build_foreign(case, Path(hf_dir), groups, attached=not case.padded, fixed_shape=case.pad_to is not None)
    reference = None
    if needs.perturbation is not None:
        reference = build_foreign(case, scores.reference_dir, groups).model
    batches = preference_batches(
        pairs,
        objective,
        global_batch_size=len(pairs),
        num_microbatches=case.num_microbatches,
        layout="padded" if case.padded else "packed",
        vocab_size=foreign.arch.vocab_size if case.padded else None,
        pad_to=case.pad_to,
        context_token_id=BOS,
        unconditional="pass" if case.before_step else "rows",
        share_prompts=case.share_prompts,
        multiple_of=case.tp if case.sequence_parallel else 1,
        seed=1234 + groups.rank * case.seed_apart,
        groups=groups,
    )
    step = PreferenceStep(objective, reference=reference, groups=groups)
    batch = batches.peek()
    if case.before_step:
        step.before_step(foreign.model, batch)
    reports = run_schedule(foreign, step, batches, num_microbatches=case.num_microbatches)
    metrics = step.after_step()
    pairs.reference_scores = pairs.mismatched = None
    gradients = gather_gradients(foreign.model, foreign.arch, Path(hf_dir), groups)
    losses = [torch.stack([report["loss"] for report in reports]).sum(0) if reports else torch.zeros(2)]
    dist.all_reduce(losses[0], group=groups.dp)
    total, count = from_last_stage(losses[0], groups).tolist()
    if gradients is None:
        return None
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    assert count == len(pairs)
    in_order = {name: values[batch.pair_indices.argsort()] for name, values in metrics.values.items()}
    assert total / count == pytest.approx(metrics.values["loss"].double().mean().item(), rel=1e-6)
    return {"loss": total / count, "metrics": in_order, "gradients": gradients, "norm": norm}


def run_foreign(cases: list[ForeignCase], folder: str, pairs: PairCollection) -> list[Any]:
    """Loss and gradients of several cases, each in a loop of its own; of a refused one the message."""
    scores: dict[str, ReferenceScores] = {}

    def compute(case: Any, folder: str, pairs: PairCollection, groups: ProcessGroups) -> Any:
        known = scores.setdefault(str(case.layout()), ReferenceScores(f"{folder}/{case.model}/reference", groups))
        try:
            return loss_and_gradients(case, f"{folder}/{case.model}/model", pairs, known)
        except ConfigError as error:
            pairs.reference_scores = pairs.mismatched = None
            return str(error)

    return run_at_layouts(compute, cases, folder, pairs)  # type: ignore[arg-type]
