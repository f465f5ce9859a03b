"""How long pipeline stages wait for each other in a step, from what its packs cost.

The order is that of Megatron's schedules (1F1B, interleaved where stages hold several chunks of layers; forward after forward in
a forward-only pass), in which a stage that has something to hand over waits until its neighbour takes it. Passes follow each
other without a barrier: a first stage begins the next one while the last stage is still at this one.

Shape letters: S stages, C chunks of each, M packs of a pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# What a stage does with a pack: (whether it is its backward, number of the pack, which of the stage's chunks).
Work = tuple[bool, int, int]
# What stages hand to each other: (number of the pass, whether it is a gradient, number of the pack, the chunk that sends it,
# counted in the order in which a pack goes through all chunks).
Message = tuple[int, bool, int, int]
# What a pack costs beside its tokens, as so many tokens more. By an H100's data sheet 300: in the time in which its memory reads
# a weight twice and adds to its fp32 gradient, 12 bytes, half of its peak computes 6 FLOPs a token. The rest stands for kernel
# launches and for what stages say to each other before each pack. Assumed, not measured on a GPU.
PACK_TOKENS = 500


@dataclasses.dataclass(frozen=True)
class Stages:
    """How the layers are split over the stages of a pipeline.

    Attributes:
        shares: of all layers, by stage, by chunk.
    """

    shares: tuple[tuple[float, ...], ...] = ((1.0,),)

    @classmethod
    def even(cls, num_stages: int, num_chunks: int = 1) -> Stages:
        """The same share for each."""
        return cls(((1.0 / num_stages / num_chunks,) * num_chunks,) * num_stages)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.shares)

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.shares[0])

    @property
    def packs_multiple(self) -> int:
        """The schedule's passes have a multiple of so many packs: an interleaved one runs groups of one for each stage."""
        return self.num_stages if self.num_chunks > 1 else 1


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """What one data-parallel rank's packs cost in one pass, in the units of the cost model.

    Attributes:
        layers: float64 ``[M]``, forward, of all stages together. The embedding looks rows up, and counts as nothing.
        head: float64 ``[M]``, forward, of the output layer, which the last stage has as well.
        layers_back, head_back: float64 ``[M]``, of each pack's backward; zeros where none follows.
    """

    layers: np.ndarray
    head: np.ndarray
    layers_back: np.ndarray
    head_back: np.ndarray

    @classmethod
    def scaled(cls, layers: np.ndarray, head: np.ndarray, layers_factor: float, head_factor: float) -> PassCosts:
        """Packs whose backward is a multiple of their forward."""
        return cls(layers, head, layers_factor * layers, head_factor * head)

    @property
    def backward(self) -> bool:
        """Whether each pack's backward follows."""
        return bool(self.layers_back.any())

    @property
    def forward_only(self) -> PassCosts:
        """The same packs without a backward."""
        return PassCosts.scaled(self.layers, self.head, 0.0, 0.0)

    @property
    def back_over_forward(self) -> float:
        """What the layers' backward costs over their forward, of all packs."""
        return float(self.layers_back.sum()) / max(float(self.layers.sum()), 1e-9)

    @property
    def head_back_over_forward(self) -> float:
        """The same of the output layer."""
        return float(self.head_back.sum()) / max(float(self.head.sum()), 1e-9)

    @property
    def work(self) -> float:
        """Of all stages, forward and backward."""
        return float((self.layers + self.layers_back).sum()) + self.head_work

    @property
    def head_work(self) -> float:
        """Of the output layer, forward and backward."""
        return float((self.head + self.head_back).sum())

    def with_overhead(self, cost_per_token: float) -> PassCosts:
        """The same packs with what each costs beside its tokens."""
        more = PACK_TOKENS * cost_per_token
        more_back = more * self.back_over_forward
        return dataclasses.replace(self, layers=self.layers + more, layers_back=self.layers_back + more_back)

    def on_chunk(self, stages: Stages, stage: int, chunk: int, *, back: bool = False) -> np.ndarray:
        """The part of a chunk of a stage, float64 ``[M]``: its share of the layers, and the output layer behind the last."""
        layers, head = (self.layers_back, self.head_back) if back else (self.layers, self.head)
        own = layers * stages.shares[stage][chunk]
        is_last = (stage, chunk) == (stages.num_stages - 1, stages.num_chunks - 1)
        return own + head if is_last else own

    def stage_work(self, stages: Stages) -> list[float]:
        """Forward and backward of each stage."""
        ways = [(chunk, back) for chunk in range(stages.num_chunks) for back in (False, True)]
        return [
            float(sum(self.on_chunk(stages, stage, chunk, back=back).sum() for chunk, back in ways))
            for stage in range(stages.num_stages)
        ]


def fastest_packs(num_tokens: int, stages: Stages) -> int:
    """Into how many packs a pass is cut that takes least: fewer wait longer, more cost more besides their tokens.

    M even packs of W tokens in all take ``(W / M + PACK_TOKENS) (M + (S - 1) / C)``, least at
    ``M = sqrt(W (S - 1) / C / PACK_TOKENS)``.
    """
    return max(1, round(math.sqrt(num_tokens * (stages.num_stages - 1) / stages.num_chunks / PACK_TOKENS)))


def even_bubble(num_stages: int, num_packs: int, num_chunks: int = 1) -> float:
    """Idle share of a pass of equal packs over equal stages and chunks: (S - 1) / (C M + S - 1)."""
    return (num_stages - 1) / (num_chunks * num_packs + num_stages - 1)


def even_length(passes: Sequence[PassCosts], stages: Stages) -> float:
    """How long a step would take if the same work came in equal packs and stages, pass after pass with a barrier between."""
    size, chunks = stages.num_stages, stages.num_chunks
    return sum(one.work / size / (1.0 - even_bubble(size, len(one.layers), chunks)) for one in passes)


def idle_share(work: float, longest: float, num_stages: int, num_replicas: int) -> float:
    """Share of the time that the stages of all replicas wait, where the replica that takes longest sets the step's end."""
    return max(0.0, 1.0 - work / (longest * num_stages * num_replicas)) if longest else 0.0


def stage_order(stage: int, stages: Stages, num_packs: int, *, backward: bool) -> list[Work]:
    """What a stage does in a pass, one after the other."""
    forwards, backwards, ahead = _orders(stage, stages, num_packs, backward=backward)
    order = forwards[:ahead]
    for one, other in zip(forwards[ahead:], backwards, strict=False):
        order += [one, other]
    return order + backwards[len(forwards) - ahead :]


def _orders(stage: int, stages: Stages, num_packs: int, *, backward: bool) -> tuple[list[Work], list[Work], int]:
    """A stage's forwards, its backwards, and how many of the first run ahead of the second."""
    size, chunks = stages.num_stages, range(stages.num_chunks)
    groups = [range(first, min(first + size, num_packs)) for first in range(0, num_packs, size)]
    in_turn = [(pack, chunk) for group in groups for chunk in chunks for pack in group]
    forwards: list[Work] = [(False, pack, chunk) for pack, chunk in in_turn]
    if not backward:
        return forwards, [], len(forwards)
    backwards: list[Work] = [(True, pack, chunks[-1] - chunk) for pack, chunk in in_turn]
    behind = size - 1 - stage
    ahead = behind if stages.num_chunks == 1 else 2 * behind + (stages.num_chunks - 1) * size
    return forwards, backwards, min(ahead, len(forwards))


def simulated_length(passes: Sequence[PassCosts], stages: Stages) -> float:
    """How long one replica takes for the passes of a step, in the units of the costs, from its first pack to its last."""
    make = _program if stages.num_chunks == 1 else _interleaved_program
    return _run([make(passes, stage, stages) for stage in range(stages.num_stages)])


def least_length(passes: Sequence[PassCosts], stages: Stages) -> float:
    """What :func:`simulated_length` is at least, without a simulation: a stage's work, and a pack's way to it and back."""
    first, last = passes[0], passes[-1]
    longest = way = 0.0
    for stage in range(stages.num_stages):
        longest = max(longest, way + sum(one.stage_work(stages)[stage] for one in passes))
        way += float(first.on_chunk(stages, stage, 0).min())
        way += float(last.on_chunk(stages, stage, 0, back=True).min())
    return longest


# What a stage does: each time a cost, and then what is handed over, all of it at one time.
_Program = list[tuple[float, list[Message]]]


def _run(programs: Sequence[_Program]) -> float:
    """When the last of the stages is at its end, each of which waits for those that it hands something to or takes it from."""
    clocks, places, announced = [0.0] * len(programs), [0] * len(programs), [-1] * len(programs)
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

    unfinished = list(range(len(programs)))
    while unfinished:
        before = sum(places) + sum(announced)
        unfinished = [stage for stage in unfinished if go_on(stage)]
        assert sum(places) + sum(announced) > before, "stages wait for each other"
    return max(clocks)


def _program(passes: Sequence[PassCosts], stage: int, stages: Stages) -> _Program:
    """What a stage does that holds one chunk."""
    program: _Program = []
    receiver = -1  # of what was made last; none at first, and beyond either end
    for number, one in enumerate(passes):
        costs, back = (one.on_chunk(stages, stage, 0, back=back).tolist() for back in (False, True))
        for is_backward, pack, _ in stage_order(stage, stages, len(costs), backward=one.backward):
            direction = -1 if is_backward else 1
            sender = stage - direction
            if 0 <= sender < stages.num_stages:
                message = (number, is_backward, pack, sender)
                if sender == receiver:
                    # Both at once: else each of the two would wait for the other to take.
                    program[-1][1].append(message)
                else:
                    program.append((0.0, [message]))
            receiver = stage + direction
            sent: list[Message] = [(number, is_backward, pack, stage)] if 0 <= receiver < stages.num_stages else []
            program.append(((back if is_backward else costs)[pack], sent))
    return program


def _interleaved_program(passes: Sequence[PassCosts], stage: int, stages: Stages) -> _Program:
    """What a stage does that holds several chunks: it takes what comes next with handing over what it made last."""
    program: _Program = []
    for number, one in enumerate(passes):
        # Fillers, which the schedule needs, are rows like the first.
        fillers = -len(one.layers) % stages.num_stages
        filled = PassCosts(
            *(np.append(costs, [costs[0]] * fillers) for costs in (one.layers, one.head, one.layers_back, one.head_back))
        )
        program += _interleaved_pass(filled, number, stage, stages)
    return program


def _interleaved_pass(one: PassCosts, number: int, stage: int, stages: Stages) -> _Program:
    costs, costs_back = (
        [one.on_chunk(stages, stage, chunk, back=back).tolist() for chunk in range(stages.num_chunks)] for back in (False, True)
    )
    forwards, backwards, ahead = _orders(stage, stages, len(one.layers), backward=one.backward)
    size, last = stages.num_stages, stages.num_stages * stages.num_chunks - 1

    def sent(work: Work) -> list[Message]:
        """What the chunk hands on; nothing at either end of all chunks."""
        is_backward, pack, chunk = work
        place = chunk * size + stage
        return [] if place == (0 if is_backward else last) else [(number, is_backward, pack, place)]

    def taken(works: list[Work], index: int) -> list[Message]:
        """What comes while a work of this number is at its end: of the neighbour's, what this stage will need."""
        is_backward = works[0][0]
        is_first_in_turn = stage == (size - 1 if is_backward else 0)
        # A neighbour at the other end of the pipeline is as many works behind as there are stages between.
        index = index - (size - 1) if is_first_in_turn else index + 1
        if not 0 <= index < len(works):
            return []
        _, pack, chunk = works[index]
        place = chunk * size + (stage + 1 if is_backward else stage - 1) % size
        # Around the end of the pipeline it comes out of the same chunk there, and goes into the next one here.
        return [] if is_first_in_turn and place == (0 if is_backward else last) else [(number, is_backward, pack, place)]

    program: _Program = [(0.0, taken(forwards, -1))]
    steady = len(forwards) - ahead
    for index, (_, pack, chunk) in enumerate(forwards[:ahead]):
        messages = sent(forwards[index]) + (taken(forwards, index) if index < len(forwards) - 1 else [])
        if one.backward and index == ahead - 1 and steady:
            messages += taken(backwards, -1)
        program.append((costs[chunk][pack], messages))
    for index in range(steady):
        forward, back = forwards[ahead + index], backwards[index]
        cost = costs[forward[2]][forward[1]] + costs_back[back[2]][back[1]]
        arriving = (taken(forwards, ahead + index) if index < steady - 1 else []) + taken(backwards, index)
        program.append((cost, [*sent(forward), *sent(back), *arriving]))
    if one.backward and not steady:
        program.append((0.0, taken(backwards, -1)))
    for index in range(steady, len(backwards)):
        _, pack, chunk = backwards[index]
        arriving = taken(backwards, index) if index < len(backwards) - 1 else []
        program.append((costs_back[chunk][pack], [*sent(backwards[index]), *arriving]))
    return program
