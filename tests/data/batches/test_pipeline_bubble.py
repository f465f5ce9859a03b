"""The simulated pipeline: its order is that of Megatron's schedule, its length the textbook's, and one worked by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rmipo.data.batches.pipeline_bubble import (
    PACK_TOKENS,
    PassCosts,
    Stages,
    Work,
    even_bubble,
    even_length,
    fastest_packs,
    idle_share,
    least_length,
    simulated_length,
    stage_order,
)
from megatron_rmipo.passes.interleaving import messages_in_order
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

STAGES = 4


def costs(*layers: float, head: float = 0.0, backward: bool = True) -> PassCosts:
    factor = 2.0 * backward
    return PassCosts.scaled(np.array(layers), np.full(len(layers), head), factor, factor)


@pytest.mark.parametrize(("num_stages", "num_packs"), [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 7, 16))])
def test_equal_packs_over_equal_stages_take_what_the_formula_says(num_stages: int, num_packs: int) -> None:
    for backward in (False, True):
        one = costs(*[3.0] * num_packs, backward=backward)
        length = simulated_length([one], Stages.even(num_stages))
        assert length == pytest.approx(even_length([one], Stages.even(num_stages)))
        assert idle_share(one.work, length, num_stages, 1) == pytest.approx(even_bubble(num_stages, num_packs))


def test_two_stages_by_hand() -> None:
    # Stage 0: 1, then it waits until stage 1 takes the second pack; stage 1: 1 + 2 of the head, then 3.
    forward_only = costs(2.0, 6.0, 2.0, backward=False)
    assert simulated_length([forward_only], Stages.even(2)) == 1 + 3 + 3 + 1
    assert simulated_length([costs(2.0, 6.0, 2.0, head=2.0, backward=False)], Stages.even(2)) == 1 + 3 + 5 + 3
    # Stage 0: F0 to 1, F1 to 4, B0 4 to 6, B1 13 to 19. Stage 1: F0 1 to 2, B0 2 to 4, F1 4 to 7, B1 7 to 13.
    assert simulated_length([costs(2.0, 6.0)], Stages.even(2)) == 19
    # Stage 0 as before, but B0 from 10 on, B1 from 25 on. Stage 1: F0 1 to 4, B0 4 to 10, F1 10 to 15, B1 15 to 25.
    assert simulated_length([costs(2.0, 6.0, head=2.0)], Stages.even(2)) == 31
    # Of frozen weights a backward is as long as the forward. Stage 0: F0 to 1, F1 to 4, B0 8 to 9, B1 18 to 21.
    # Stage 1: F0 1 to 4, B0 4 to 8 with a head of 2 + 1 in it, F1 8 to 13, B1 13 to 18.
    frozen = PassCosts(np.array([2.0, 6.0]), np.full(2, 2.0), np.array([2.0, 6.0]), np.array([3.0, 2.0]))
    assert simulated_length([frozen], Stages.even(2)) == 21
    assert least_length([frozen], Stages.even(2)) == 1 + frozen.stage_work(Stages.even(2))[1] + 1
    assert (frozen.work, frozen.head_work) == (25.0, 9.0)


def test_a_pass_begins_while_the_one_before_drains() -> None:
    before, gradient = costs(4.0, 4.0, backward=False), costs(4.0, 4.0)
    apart = sum(simulated_length([one], Stages.even(4)) for one in (before, gradient))
    assert apart == even_length([before, gradient], Stages.even(4)) == 5 + 15
    # All stages but the first would have stood still at the seam.
    assert simulated_length([before, gradient], Stages.even(4)) == 2 + 15


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_no_other_number_of_even_packs_is_faster(num_stages: int) -> None:
    for num_tokens in (700, 9_001, 40_000):
        chosen = fastest_packs(num_tokens, Stages.even(num_stages))
        times = {
            number: simulated_length([costs(*[num_tokens / number] * number).with_overhead(1.0)], Stages.even(num_stages))
            for number in range(1, 2 * chosen + 2)
        }
        assert times[chosen] <= 1.01 * min(times.values())
    assert fastest_packs(0, Stages.even(num_stages)) == fastest_packs(PACK_TOKENS // 9, Stages.even(num_stages)) == 1


@pytest.mark.parametrize("shares", [((0.4,), (0.3,), (0.3,)), ((0.2, 0.1), (0.2, 0.2), (0.1, 0.2)), ((0.1, 0.5), (0.2, 0.2))])
def test_no_step_is_shorter_than_the_least(shares: tuple[tuple[float, ...], ...]) -> None:
    random, stages = np.random.default_rng(4), Stages(shares)
    for head in (0.0, 1.5):
        passes = [costs(*random.uniform(1, 9, size), head=head, backward=size == 7) for size in (3, 7)]
        least, length = least_length(passes, stages), simulated_length(passes, stages)
        slowest = max(sum(one.stage_work(stages)[stage] for one in passes) for stage in range(len(shares)))
        assert slowest <= least <= length
    even = [costs(*[2.0] * 5)]
    assert least_length(even, Stages.even(3)) == pytest.approx(simulated_length(even, Stages.even(3)))


def test_the_replica_that_takes_longest_sets_the_step() -> None:
    slow, fast = costs(4.0, 4.0), costs(2.0, 2.0)
    longest = simulated_length([slow], Stages.even(2))
    assert longest == 18
    assert idle_share(slow.work + fast.work, longest, 2, 2) == pytest.approx(1 - 36 / (18 * 4))


@pytest.mark.parametrize(("num_stages", "num_chunks", "groups"), [*itertools.product((2, 3, 4), (2, 3), (1, 2, 5))])
def test_chunks_shorten_the_wait_of_equal_packs(num_stages: int, num_chunks: int, groups: int) -> None:
    stages, num_packs = Stages.even(num_stages, num_chunks), num_stages * groups
    for backward in (False, True):
        one = costs(*[6.0] * num_packs, backward=backward)
        length = simulated_length([one], stages)
        # What Narayanan et al. (arXiv:2104.04473) give for it, as long as nobody waits for a neighbour's backward.
        best = even_length([one], stages)
        assert best * (1 - 1e-9) <= length <= simulated_length([one], Stages.even(num_stages)), (length, best)
        if not backward:
            assert length == pytest.approx(best)


def test_uneven_stages_take_as_long_as_the_one_with_most_and_chunks_count_fillers() -> None:
    # 3 of 4 layers on the first stage: F0 3, F1 6; the second F0 4, B0 6; B0 12, B1 24 on the first.
    uneven = Stages(((0.75,), (0.25,)))
    assert simulated_length([costs(4.0, 4.0)], uneven) == 3 + 3 + 6 + 6
    assert costs(4.0, 4.0).stage_work(uneven) == [18, 6]
    assert costs(4.0, 4.0, head=1.0).stage_work(uneven) == [18, 12]
    chunked = Stages.even(2, 2)
    three, four = (costs(*[4.0] * number, backward=False) for number in (3, 4))
    assert simulated_length([three], chunked) == simulated_length([four], chunked)


class Stage(torch.nn.Module):
    """As much of a model as Megatron's schedules ask for; what it does, it writes down."""

    def __init__(self, order: list[Work], chunk: int, num_chunks: int) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=STAGES * num_chunks,
            hidden_size=1,
            num_attention_heads=1,
            pipeline_model_parallel_size=STAGES,
            virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
            pipeline_dtype=torch.float32,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            batch_p2p_comm=False,
            calculate_per_token_loss=True,
        )
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.order, self.chunk = order, chunk
        self.vp_stage = chunk if num_chunks > 1 else None
        self.received: Tensor | None = None

    def set_input_tensor(self, received: Any) -> None:
        self.received = received[0] if isinstance(received, list) else received

    def forward(self, pack: int) -> Tensor:
        self.order.append((False, pack, self.chunk))
        received = torch.ones(2 + pack, 1, 1) if self.received is None else self.received
        output = self.weight * received
        if output.requires_grad:
            output.register_hook(lambda grad: self.order.append((True, pack, self.chunk)))
        return output


def _loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return output.sum(), torch.tensor(1, dtype=torch.int), {}


def _forward_step(packs: Iterator[int], stage: Stage) -> tuple[Tensor, Any]:
    return stage(next(packs)), _loss


def orders(cases: list[tuple[int, int]]) -> list[tuple[list[Work], list[Work]]]:
    """What this stage does in Megatron's own schedule, forward only and with backward, for each number of packs and chunks."""
    groups = initialize_runtime(1, STAGES, seed=1)
    assert groups.pp_size == STAGES
    found = []
    for num_packs, num_chunks in cases:
        both = []
        for forward_only in (True, False):
            order: list[Work] = []
            chunks = [Stage(order, chunk, num_chunks) for chunk in range(num_chunks)]
            get_forward_backward_func(STAGES, num_chunks if num_chunks > 1 else None)(
                forward_step_func=_forward_step,
                data_iterator=[iter(range(num_packs)) for _ in range(num_chunks)],
                model=chunks,
                num_microbatches=num_packs,
                seq_length=1,
                micro_batch_size=1,
                forward_only=forward_only,
                # Without, as many packs as stages would never end, though it is Megatron's own order.
                **messages_in_order(chunks),
            )
            both.append(order)
        found.append((both[0], both[1]))
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_the_order_is_that_of_megatrons_schedule() -> None:
    cases = [(1, 1), (2, 1), (3, 1), (4, 1), (7, 1), (4, 2), (8, 2), (12, 3)]
    for stage, found in enumerate(run_distributed(orders, STAGES, cases)):
        for (num_packs, num_chunks), (forward_only, trained) in zip(cases, found, strict=True):
            stages = Stages.even(STAGES, num_chunks)
            assert forward_only == stage_order(stage, stages, num_packs, backward=False)
            assert trained == stage_order(stage, stages, num_packs, backward=True)
