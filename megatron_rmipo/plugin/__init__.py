"""Preference losses and log-probs inside other people's Megatron models and training loops.

What is public is listed here, and imported where it is first used: adapters to programs without Megatron do not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rmipo.data.store.collection import open_pairs
    from megatron_rmipo.model.adopt import attach_model as attach
    from megatron_rmipo.model.adopt import detach_model as detach
    from megatron_rmipo.model.logprobs import (
        ReferenceHead,
        linear_logprobs,
        perturbed_linear_logprobs,
        vocab_parallel_logprobs,
    )
    from megatron_rmipo.model.lora.foreign import add_adapter
    from megatron_rmipo.plugin.batches import preference_batches
    from megatron_rmipo.plugin.dataset import PreferenceCollator, PreferenceDataset
    from megatron_rmipo.plugin.scores import PairScores, score, score_reference
    from megatron_rmipo.plugin.step import PreferenceStep
    from megatron_rmipo.plugin.without_adapters import adapters_off

_MODEL, _OWN = "megatron_rmipo.model", "megatron_rmipo.plugin"
# Name -> (module, its name there).
_PUBLIC = {
    "PairScores": (f"{_OWN}.scores", "PairScores"),
    "PreferenceCollator": (f"{_OWN}.dataset", "PreferenceCollator"),
    "PreferenceDataset": (f"{_OWN}.dataset", "PreferenceDataset"),
    "PreferenceStep": (f"{_OWN}.step", "PreferenceStep"),
    "ReferenceHead": (f"{_MODEL}.logprobs", "ReferenceHead"),
    "add_adapter": (f"{_MODEL}.lora.foreign", "add_adapter"),
    "adapters_off": (f"{_OWN}.without_adapters", "adapters_off"),
    "attach": (f"{_MODEL}.adopt", "attach_model"),
    "detach": (f"{_MODEL}.adopt", "detach_model"),
    "linear_logprobs": (f"{_MODEL}.logprobs", "linear_logprobs"),
    "open_pairs": ("megatron_rmipo.data.store.collection", "open_pairs"),
    "perturbed_linear_logprobs": (f"{_MODEL}.logprobs", "perturbed_linear_logprobs"),
    "preference_batches": (f"{_OWN}.batches", "preference_batches"),
    "score": (f"{_OWN}.scores", "score"),
    "score_reference": (f"{_OWN}.scores", "score_reference"),
    "vocab_parallel_logprobs": (f"{_MODEL}.logprobs", "vocab_parallel_logprobs"),
}
__all__ = [
    "PairScores",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferenceStep",
    "ReferenceHead",
    "adapters_off",
    "add_adapter",
    "attach",
    "detach",
    "linear_logprobs",
    "open_pairs",
    "perturbed_linear_logprobs",
    "preference_batches",
    "score",
    "score_reference",
    "vocab_parallel_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own = _PUBLIC[name]
    return getattr(importlib.import_module(module), own)
