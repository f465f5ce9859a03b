"""The picture of one evaluation."""

from __future__ import annotations

import math

import numpy as np

from megatron_rmipo.reports.pictures.gaps import GAP_AXIS
from megatron_rmipo.reports.pictures.held_out import draw_held_out
from tests.reports.trackers.test_trackers import PAIRS


def test_a_picture_shows_what_the_pairs_have() -> None:
    figure = draw_held_out("step 3", PAIRS)
    assert figure is not None
    margins, gaps = figure.axes
    assert margins.get_title() == "median 0.750, n = 2"
    assert (gaps.get_title(), gaps.get_xlabel()) == ("median 1.000, n = 3", GAP_AXIS)
    assert sum(bar.get_height() for bar in gaps.patches) == 3
    # In the style of all pictures.
    assert not gaps.spines["top"].get_visible()
    assert draw_held_out("step 3", {"loss": np.ones(3, dtype=np.float32)}) is None
    assert draw_held_out("step 3", {"gamma": np.full(3, math.nan, dtype=np.float32)}) is None
