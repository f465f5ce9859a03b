"""The meters of the benchmarks, against calls whose cost is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import counted_flops, peak_bytes

FLOAT_BYTES = 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU's allocator")
def test_peak_is_the_most_that_was_in_use_at_once() -> None:
    def two_of_three_at_once() -> None:
        first = torch.zeros(1000, 500)
        second = torch.zeros(1000, 500)
        del first
        third = torch.zeros(1000, 500)
        assert second.shape == third.shape

    assert peak_bytes(two_of_three_at_once) == 2 * 500_000 * FLOAT_BYTES


def test_flops_of_a_product_and_of_attention_with_their_gradients() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert counted_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert counted_flops(lambda: torch.zeros(3, 7).addmm_(a.detach(), b.detach())) == 2 * 3 * 5 * 7
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    forward = 2 * (2 * 16 * 16 * 8) * 2
    assert counted_flops(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True)) == forward
    both = counted_flops(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward())
    # Backward: the scores again and four products of the same size.
    assert both == forward + forward / 2 * 5
