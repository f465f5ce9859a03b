"""Numbers as a reader of the report sees them."""

from __future__ import annotations

import math

from megatron_rmipo.reports.held_out import Figure, plus_minus

MISSING = "\u2013"


def short_number(value: float | None) -> str:
    """Four digits that count, in the shortest form: ``0.4912``, ``1,234``, ``6e-07``."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.4g}"


def figure_text(figure: Figure | None, form: str = ".3f") -> str:
    """A mean with its standard error."""
    if figure is None:
        return MISSING
    return f"{figure.value:{form}}" + plus_minus(figure.error, form).replace("+-", "\u00b1")


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def tick_values(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((unit * factor for factor in (1.0, 2.0, 2.5, 5.0) if unit * factor >= raw), 10.0 * unit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
