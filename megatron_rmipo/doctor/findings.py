"""What was found out, a line each, and what it means for the whole."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Literal

Status = Literal["OK", "WARN", "FAIL"]
_WIDTH = 130
_MARGIN = 27  # of status and name


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what, in a word or two.
        status: FAIL: a run would fail or compute wrong; WARN: it may, or is slower than it could be.
        text: what was found.
        remedy: what to do where it is not OK.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def lines(self) -> list[str]:
        """Aligned with others."""
        text = self.text if not self.remedy else f"{self.text}. {self.remedy}"
        first, *rest = textwrap.wrap(text, _WIDTH - _MARGIN) or [""]
        return [f"{self.status:<6}{self.name:<20} {first}", *(" " * _MARGIN + line for line in rest)]


def attempt(name: str, look: Callable[[], Finding], remedy: str) -> Finding:
    """What ``look`` finds; what stops it is found, too."""
    try:
        return look()
    except Exception as error:  # whatever a broken installation does
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return Finding(name, "FAIL", f"{type(error).__name__}: {reason}", remedy)


def verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    failed, warned = (sum(one.status == status for one in findings) for status in ("FAIL", "WARN"))
    if failed:
        return f"not fit to train: {failed} of {len(findings)} checks failed, {warned} warned"
    return f"fit to train: {len(findings)} checks" + (f", {warned} of them with a warning" if warned else "")
