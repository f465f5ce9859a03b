"""Megatron-Core's HybridModel, where it has one (0.19 on)."""

from __future__ import annotations

from typing import Any

try:
    from megatron.core.models.hybrid import hybrid_model
except ImportError:
    HybridModel: Any = None
else:
    HybridModel = hybrid_model.HybridModel
