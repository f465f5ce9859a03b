"""Means and percentiles of metrics per pair."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rmipo.reports.metrics import summarize, summarize_held_out


def test_means_and_percentiles_by_hand() -> None:
    values = torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0])
    summary = summarize({"gamma": values, "loss": values * 2}, ("gamma",))
    # 5 values: rank p/100 * 4, interpolated: p5 at 0.2 -> 1.2, p50 -> 3, p95 at 3.8 -> 4.8
    expected = {"gamma": 3.0, "loss": 6.0, "gamma/p5": 1.2, "gamma/p50": 3.0, "gamma/p95": 4.8}
    assert summary == pytest.approx(expected)
    assert list(summary) == ["gamma", "loss", "gamma/p5", "gamma/p50", "gamma/p95"]


def test_one_pair() -> None:
    assert summarize({"x": torch.tensor([2.5])}, ("x",)) == {"x": 2.5, "x/p5": 2.5, "x/p50": 2.5, "x/p95": 2.5}


def test_sums_are_taken_in_float64() -> None:
    # In fp32 the small ones are lost beside 2**24.
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(1023)])
    assert summarize({"x": values})["x"] == (2.0**24 + 1023) / 1024


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    assert math.isnan(summarize({"loss": torch.tensor([1.0, float("nan")])})["loss"])


def test_pairs_without_a_value_are_left_out() -> None:
    nan = float("nan")
    values = {"x": torch.tensor([1.0, nan, 4.0]), "y": torch.tensor([nan, nan, nan])}
    assert summarize(values, ("x", "y")) == pytest.approx({"x": 2.5, "x/p5": 1.15, "x/p50": 2.5, "x/p95": 3.85})


def test_held_out_figures_come_with_what_they_stand_on() -> None:
    nan = float("nan")
    right, some = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, nan, 4.0, nan])
    values = {"rewards/accuracies": right, "rewards/margins": right * 2, "x": some, "gamma": torch.full((4,), 1.6)}
    summary = summarize_held_out({**values, "loss": torch.tensor([1.0, nan, 1.0, 2.0])}, ("gamma",))
    found = {name: summary[name] for name in summary if name == "num_pairs" or name.endswith(("/se", "/n"))}
    # A share: sqrt(0.75 * 0.25 / 4). A mean: sd / sqrt(n). What is always the same tells no error.
    expected = {"num_pairs": 4, "rewards/accuracies/se": 0.216506, "rewards/margins/se": 0.5, "x/se": 1.5, "x/n": 2}
    assert found == pytest.approx(expected, abs=1e-6)
    assert {name: value for name, value in summary.items() if name not in found and name != "loss"} == pytest.approx(
        summarize(values, ("gamma",))
    )
    assert summarize_held_out({"rewards/accuracies": torch.ones(1)}) == {"num_pairs": 1, "rewards/accuracies": 1.0}
