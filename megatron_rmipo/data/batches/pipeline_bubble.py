"""How long pipeline stages wait for each other in a step, from what its packs cost.

The order is that of Megatron's schedule without interleaving (1F1B; forward after forward in a forward-only pass), in which a
stage that has something to hand over waits until its neighbour takes it. Passes follow each other without a barrier: a first
stage begins the next one while the last stage is still at this one.

Shape letters: S stages, M packs of a pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# What a stage does with a pack: (whether it is its backward, number of the pack).
Work = tuple[bool, int]
# What stages hand to each other: (number of the pass, whether it is a gradient, number of the pack, the stage that sends it).
Message = tuple[int, bool, int, int]
# Backward costs twice the forward.
BACKWARD = 2.0
# What a pack costs beside its tokens, as so many tokens more. By an H100's data sheet 300: in the time in which its memory reads
# a weight twice and adds to its fp32 gradient, 12 bytes, half of its peak computes 6 FLOPs a token. The rest stands for kernel
# launches and for what stages say to each other before each pack. Assumed, not measured on a GPU.
PACK_TOKENS = 500


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """What one data-parallel rank's packs cost in one pass, forward, in the units of the cost model.

    Attributes:
        layers: float64 ``[M]``, of all stages together. The embedding looks rows up, and counts as nothing.
        head: float64 ``[M]``, of the output layer, which the last stage has as well.
        backward: whether each pack's backward follows.
    """

    layers: np.ndarray
    head: np.ndarray
    backward: bool

    @property
    def work(self) -> float:
        """Of all stages, forward and backward."""
        return float((self.layers + self.head).sum()) * (1.0 + BACKWARD * self.backward)

    def with_overhead(self, cost_per_token: float) -> PassCosts:
        """The same packs with what each costs beside its tokens."""
        return dataclasses.replace(self, layers=self.layers + PACK_TOKENS * cost_per_token)

    def on_stage(self, stage: int, num_stages: int) -> np.ndarray:
        """The part of a stage, float64 ``[M]``: an equal number of layers each."""
        own = self.layers / num_stages
        return own + self.head if stage == num_stages - 1 else own


def fastest_packs(num_tokens: int, num_stages: int) -> int:
    """Into how many packs a pass is cut that takes least: fewer wait longer, more cost more besides their tokens.

    M even packs of W tokens in all take ``(W / M + PACK_TOKENS) (M + S - 1)``, least at ``M = sqrt(W (S - 1) / PACK_TOKENS)``.
    """
    return max(1, round(math.sqrt(num_tokens * (num_stages - 1) / PACK_TOKENS)))


def even_bubble(num_stages: int, num_packs: int) -> float:
    """Idle share of a pass of equal packs over equal stages: (S - 1) / (M + S - 1)."""
    return (num_stages - 1) / (num_packs + num_stages - 1)


def even_length(passes: Sequence[PassCosts], num_stages: int) -> float:
    """How long a step would take if the same work came in equal packs and stages, pass after pass with a barrier between."""
    return sum(one.work / num_stages / (1.0 - even_bubble(num_stages, len(one.layers))) for one in passes)


def idle_share(work: float, longest: float, num_stages: int, num_replicas: int) -> float:
    """Share of the time that the stages of all replicas wait, where the replica that takes longest sets the step's end."""
    return max(0.0, 1.0 - work / (longest * num_stages * num_replicas)) if longest else 0.0


def stage_order(stage: int, num_stages: int, num_packs: int, *, backward: bool) -> list[Work]:
    """What a stage does in a pass, one after the other."""
    if not backward:
        return [(False, number) for number in range(num_packs)]
    ahead = min(num_stages - 1 - stage, num_packs)
    order = [(False, number) for number in range(ahead)]
    for number in range(num_packs - ahead):
        order += [(False, ahead + number), (True, number)]
    return order + [(True, number) for number in range(num_packs - ahead, num_packs)]


def simulated_length(passes: Sequence[PassCosts], num_stages: int) -> float:
    """How long one replica takes for the passes of a step, in the units of the costs, from its first pack to its last."""
    programs = [_program(passes, stage, num_stages) for stage in range(num_stages)]
    clocks, places, announced = [0.0] * num_stages, [0] * num_stages, [-1] * num_stages
    # When one side of a message came to it, and when both were there.
    waiting: dict[Message, float] = {}
    handed_over: dict[Message, float] = {}

    def go_on(stage: int) -> bool:
        """Run a stage as far as its neighbours allow; whether it is not at its end."""
        program = programs[stage]
        while places[stage] < len(program):
            cost, messages = program[places[stage]]
            if announced[stage] < places[stage]:
                announced[stage] = places[stage]
                clocks[stage] += cost
                for message in messages:
                    if message in waiting:
                        handed_over[message] = max(waiting[message], clocks[stage])
                    else:
                        waiting[message] = clocks[stage]
            if not all(message in handed_over for message in messages):
                return True
            clocks[stage] = max([clocks[stage], *(handed_over[message] for message in messages)])
            places[stage] += 1
        return False

    unfinished = list(range(num_stages))
    while unfinished:
        before = sum(places) + sum(announced)
        unfinished = [stage for stage in unfinished if go_on(stage)]
        assert sum(places) + sum(announced) > before, "stages wait for each other"
    return max(clocks)


def _program(passes: Sequence[PassCosts], stage: int, num_stages: int) -> list[tuple[float, list[Message]]]:
    """What a stage does: each time a cost, and then what is handed over, all of it at one time."""
    program: list[tuple[float, list[Message]]] = []
    receiver = -1  # of what was made last; none at first, and beyond either end
    for number, one in enumerate(passes):
        costs = one.on_stage(stage, num_stages).tolist()
        for is_backward, pack in stage_order(stage, num_stages, len(costs), backward=one.backward):
            direction = -1 if is_backward else 1
            sender = stage - direction
            if 0 <= sender < num_stages:
                message = (number, is_backward, pack, sender)
                if sender == receiver:
                    # Both at once: else each of the two would wait for the other to take.
                    program[-1][1].append(message)
                else:
                    program.append((0.0, [message]))
            receiver = stage + direction
            sent: list[Message] = [(number, is_backward, pack, stage)] if 0 <= receiver < num_stages else []
            program.append((costs[pack] * (BACKWARD if is_backward else 1.0), sent))
    return program
