"""What of a foreign loop would give other gradients is refused; auxiliary losses of its routers are the means they should be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.adopt import attach_model
from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, PairLogps
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.objectives.sft import Sft
from megatron_rmipo.passes.rows import row_output
from megatron_rmipo.plugin.batches import PreferenceBatches, preference_batches
from megatron_rmipo.plugin.dataset import PreferenceCollator, PreferenceDataset
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.model.built import VOCAB, Built, build
from tests.plugin.foreign import Foreign, run_schedule

EXPERTS = {
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.1,
    "moe_token_dispatcher_type": "allgather",
    "add_bias_linear": False,
}


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def make_pairs(count: int = 7) -> list[tuple[Any, ...]]:
    random = np.random.default_rng(11)
    return [tuple(random.integers(1, VOCAB, size=int(random.integers(1, 9))) for _ in range(3)) for _ in range(count)]


def wrapped(groups: ProcessGroups, **config: Any) -> Foreign:
    """A model as its owner has it in a loop, attached."""
    torch.compiler.set_stance("force_eager")
    inner = build(Built(config={"calculate_per_token_loss": True, **config}), groups)
    inner.config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)
    attach_model(model, vocab_size=VOCAB)
    return Foreign(model, None, groups)  # type: ignore[arg-type]


def batches_of(groups: ProcessGroups, objective: Any, num_microbatches: int = 3, **settings: Any) -> PreferenceBatches:
    settings = {"global_batch_size": 7, "context_token_id": 0, **settings}
    return preference_batches(make_pairs(), objective, num_microbatches=num_microbatches, groups=groups, **settings)


class Nothing(Sft):
    """Reads log p(y) beside log p(y | x), and has no gradient."""

    name: ClassVar[str] = "nothing"
    needs = LogpNeeds(unconditional="bos")  # type: ignore[assignment]

    def __call__(self, logps: PairLogps) -> LossOutput:
        return LossOutput(losses=0.0 * logps.chosen_logps, metrics={})


def router_gradients(foreign: Foreign) -> list[Tensor]:
    return [layer.mlp.router.weight.main_grad.clone() for layer in foreign.model.module.decoder.layers]


@pytest.mark.parametrize("num_microbatches", [1, 3, 9])
def test_auxiliary_losses_of_routers_are_means_over_the_tokens_that_count(groups: ProcessGroups, num_microbatches: int) -> None:
    foreign, objective = wrapped(groups, **EXPERTS), Nothing()
    batches = batches_of(groups, objective, num_microbatches)
    rows = batches.peek().conditional
    run_schedule(foreign, PreferenceStep(objective, groups=groups), batches, num_microbatches=num_microbatches)
    found = router_gradients(foreign)
    # Without the factor for loops that divide by tokens, a row's losses are means; each row counts by its tokens.
    for layer in foreign.model.module.decoder.layers:
        layer.mlp.router.calculate_per_token_loss = False
    foreign.model.zero_grad_buffer()
    counted = torch.tensor([(row.num_tokens - row.num_alone_tokens) * bool(row.pair_numbers[0] >= 0) for row in rows])
    for row, share in zip(rows, counted / counted.sum(), strict=True):
        MoEAuxLossAutoScaler.set_loss_scale(share)
        (0.0 * row_output(foreign.model, row).sum()).backward()
    for one, expected in zip(found, router_gradients(foreign), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)


def test_auxiliary_losses_are_refused_where_nobody_knows_the_tokens_of_a_pair(groups: ProcessGroups) -> None:
    foreign, objective = wrapped(groups, **EXPERTS), build_objective("simpo", {})
    dataset = PreferenceDataset(make_pairs(), objective)
    given = PreferenceCollator(dataset, vocab_size=VOCAB)([dataset[0], dataset[1]])
    with pytest.raises(ConfigError, match="moe_aux_loss_coeff"):
        PreferenceStep(objective, groups=groups)(iter([given]), foreign.model)


def test_loops_that_would_give_other_gradients_are_refused(groups: ProcessGroups) -> None:
    foreign, objective = wrapped(groups), build_objective("simpo", {})

    def run(step: PreferenceStep, batches: PreferenceBatches, num_microbatches: int = 3) -> None:
        run_schedule(foreign, step, batches, num_microbatches=num_microbatches)

    step, batches = PreferenceStep(objective, groups=groups), batches_of(groups, objective, total_pairs=21)
    run(step, batches, 2)
    with pytest.raises(ConfigError, match="run 2 of the 3 micro-batches"):
        step.after_step()
    with pytest.raises(ConfigError, match="run 2 of the 3 micro-batches"):
        step.before_step(foreign.model, batches.peek())
    step = PreferenceStep(objective, groups=groups)
    step.before_step(foreign.model, batches.peek())
    with pytest.raises(ConfigError, match="none was run"):
        step.after_step()
    with pytest.raises(ConfigError, match="run 1 of the 3 micro-batches"):
        run(step, batches, 4)
    batches = batches_of(groups, objective)
    run(step := PreferenceStep(objective, groups=groups), batches)
    step.after_step()
    tokens = Foreign(foreign.model, foreign.arch, groups)
    batches.peek = batches_of(groups, objective).peek  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="the data is at its end"):
        run_schedule(tokens, step, batches, num_microbatches=3)
    foreign.model.buffers[0].gradient_scaling_factor = 0.5
    with pytest.raises(ConfigError, match="before the model is wrapped"):
        run(step, batches_of(groups, objective))


def test_nothing_of_a_batch_outlives_its_step(groups: ProcessGroups) -> None:
    objective = build_objective("epsilon_dpo", {})
    foreign, reference = wrapped(groups), wrapped(groups)
    step = PreferenceStep(objective, reference=reference.model, groups=groups)
    batches = batches_of(groups, objective)
    step.before_step(foreign.model, batches.peek())
    kept = [weakref.ref(head.hidden) for head in step._prepared.references]
    kept += [weakref.ref(batches.peek())]
    assert len(kept) == 4
    run_schedule(foreign, step, batches, num_microbatches=3)
    step.after_step()
    gc.collect()
    assert [one() for one in kept] == [None] * 4
