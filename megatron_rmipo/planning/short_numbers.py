"""How a plan's numbers are written."""

from __future__ import annotations


def figure(number: float) -> str:
    """Three digits that count, whole numbers from 100 on."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
