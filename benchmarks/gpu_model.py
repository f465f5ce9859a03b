"""The model that a GPU's memory holds, and what its speed says of the whole one.

Llama-3-8B with fewer layers and everything else as it is: a layer then costs what it costs in the whole model, and only the two
ends (embedding and output layer) weigh more than they would there. :func:`seconds_at` takes that out.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_layout import UNCONDITIONAL_PACK_FACTOR
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.estimate import pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import standing_memory

FULL_LAYERS = 32
# What is left to what is not counted: attention masks, the optimizer's temporaries, fragmentation.
USABLE_MEMORY = 0.9


def needed_bytes(arch: ModelArchitecture, config: Config, tokens: int) -> float:
    """What training takes on one GPU: what stands, and a pack of ``tokens``, all of them scored, of the pass that needs most."""
    packs = {True: tokens, False: UNCONDITIONAL_PACK_FACTOR * tokens}
    peaks = [
        pack_memory(arch, config, PackSize(size, size), backward=backward, fused=True).peak for backward, size in packs.items()
    ]
    return standing_memory(arch, config, 1, 0).total + max(peaks)


def layers_that_fit(arch: ModelArchitecture, config: Config, memory_bytes: float, tokens: int) -> int:
    """How many layers can be trained, at most those of the whole model; 0 where not even one.

    Args:
        arch: the model; its own number of layers is not read.
        config: how it is trained.
        memory_bytes: of the device.
        tokens: of one micro-batch.
    """
    sizes = {number: dataclasses.replace(arch, num_layers=number) for number in range(1, FULL_LAYERS + 1)}
    usable = USABLE_MEMORY * memory_bytes
    return max((number for number, one in sizes.items() if needed_bytes(one, config, tokens) <= usable), default=0)


def seconds_at(num_layers: int, *, measured_layers: int, seconds: float, ends_seconds: float) -> float:
    """What a step would take with another number of layers: ``ends + (seconds - ends) * num_layers / measured_layers``.

    Args:
        num_layers: of the model asked about.
        measured_layers, seconds: of the model that was measured, and its step.
        ends_seconds: the part of the step that does not depend on the number of layers: embedding, output layer, loss.
    """
    return ends_seconds + (seconds - ends_seconds) * num_layers / measured_layers
