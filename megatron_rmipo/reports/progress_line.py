"""The progress line: one line that is redrawn on a terminal, a plain line per record elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import TextIO

from megatron_rmipo.health.pace import HOST, RANK, SHARE
from megatron_rmipo.reports.held_out import NUM_PAIRS, plus_minus

# What a line shows of a record: name, label, format.
_SHOWN = (
    (NUM_PAIRS, "n", ".0f"),
    ("loss", "loss", ".4f"),
    ("nll/chosen", "nll", ".3f"),
    ("rewards/accuracies", "acc", ".3f"),
    ("rewards/margins", "margin", ".3f"),
    ("gamma", "gamma", ".3f"),
    ("dpmi", "dpmi", ".3f"),
    ("grad_norm", "grad", ".3f"),
    ("lr", "lr", ".2e"),
    ("pairs_per_second", "pairs/s", ".1f"),
    ("tflops_per_device", "TF/s", ".3g"),
    ("mfu", "MFU", ".1%"),
    ("pipeline_bubble", "bubble", ".0%"),
    ("memory_gib", "GiB", ".1f"),
)
NO_TEXTS: Mapping[str, str] = MappingProxyType({})
# Of a step, from which on the slowest rank is named.
_LARGE_SHARE = 0.1


class ProgressLine:
    """Shows training records as they come; evaluations and messages stay above the line.

    Args:
        stream: where to write; a terminal gets one line that is redrawn.
        total_steps: steps of the whole run.
    """

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._redraws = stream.isatty()
        self._drawn = ""

    def show(self, kind: str, record: Mapping[str, float | int], texts: Mapping[str, str] = NO_TEXTS) -> None:
        """Show a record of kind ``train`` or ``eval``; of its texts the host of a rank that holds the others up."""
        step = int(record["step"])
        text = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        if kind == "train" and "step_seconds" in record:
            text += f" eta {_clock(record['step_seconds'] * max(self._total_steps - step, 0))}"
        if kind != "train":
            text = f"{kind} at {text}"
        for name, label, form in _SHOWN:
            if name in record:
                text += f" | {label} {record[name]:{form}}{plus_minus(record.get(f'{name}/se'), form)}"
                text += f" (n {record[f'{name}/n']})" if f"{name}/n" in record else ""
        if record.get(SHARE, 0.0) >= _LARGE_SHARE:
            text += f" | slowest rank {record[RANK]:.0f} ({texts.get(HOST, '?')}) +{record[SHARE]:.0%}"
        if kind == "train" and self._redraws:
            self._draw(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Write a line that stays, above the one that is redrawn."""
        line = self._drawn
        if line:
            self._erase()
        self._stream.write(text + "\n")
        if line:
            self._draw(line)
        self._stream.flush()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = ""

    def _draw(self, text: str) -> None:
        self._erase()
        # A line that wraps could not be redrawn.
        self._drawn = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write(self._drawn)
        self._stream.flush()

    def _erase(self) -> None:
        self._stream.write("\r\x1b[K")
        self._drawn = ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
