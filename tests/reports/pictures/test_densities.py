import math

import numpy as np
import pytest

from megatron_rmipo.reports.pictures.densities import density, points_over


def test_a_density_is_one_in_sum_and_high_where_the_values_are() -> None:
    points = np.linspace(0.0, 2.0, 401)
    values = np.array([0.5, 1.5, 1.5, 1.5])
    heights = density(values, points)
    assert heights.sum() * (points[1] - points[0]) == pytest.approx(1.0, abs=1e-6)
    # A kernel's peak is 1 / (width sqrt(2 pi)), its width 0.03 of the range.
    peak = 1.0 / (0.06 * math.sqrt(2.0 * math.pi))
    assert heights[100] == pytest.approx(0.25 * peak, rel=1e-6)
    assert heights[300] == pytest.approx(0.75 * peak, rel=1e-6)


def test_the_axis_covers_the_values_that_are_asked_for() -> None:
    columns = [np.linspace(0.0, 1.0, 101), np.array([])]
    assert points_over(columns)[[0, -1]] == pytest.approx([-0.15, 1.15])
    assert points_over([*columns, np.array([50.0])], 0.9)[-1] < 1.2
    # All the same: an axis all the same.
    assert points_over([np.array([2.0, 2.0])])[[0, -1]] == pytest.approx([1.95, 2.05])
