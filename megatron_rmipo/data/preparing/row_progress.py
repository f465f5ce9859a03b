"""RowProgress of a long run over rows: a bar on a terminal, else a line every so many rows."""

from __future__ import annotations

import sys
import time
from typing import Any


class RowProgress:
    """Shows rows done, pairs kept and rows rejected on stderr.

    Args:
        total: rows in all, None if unknown.
        log_interval: rows between two lines where stderr is no terminal; 0 for none.
    """

    def __init__(self, total: int | None, log_interval: int) -> None:
        self._total, self._interval = total, log_interval
        self._done = self._logged = 0
        self._start_seconds = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> RowProgress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit=" rows", unit_scale=True, dynamic_ncols=True)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, num_rows: int, num_kept: int, num_rejected: int) -> None:
        """Count rows done; the other two are totals so far."""
        self._done += num_rows
        if self._bar is not None:
            self._bar.set_postfix(kept=num_kept, rejected=num_rejected, refresh=False)
            self._bar.update(num_rows)
        elif self._interval and self._done // self._interval > self._logged:
            self._logged = self._done // self._interval
            rate = self._done / max(1e-9, time.monotonic() - self._start_seconds)
            of_total = f" of {self._total}" if self._total is not None else ""
            print(f"{self._done}{of_total} rows, {num_kept} kept, {num_rejected} rejected, {rate:.0f} rows/s", file=sys.stderr)
