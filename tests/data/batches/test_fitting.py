"""Pairs that fit no pack are refused, pairs that surely fit are not looked at, and the largest is known where it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit, largest_pair
from megatron_rmipo.data.batches.sizes import BY_TOKENS
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.errors import ConfigError

LENGTHS = [(10, 6, 9), (3, 14, 2), (7, 2, 8)]
LONGEST = 19


def pairs() -> PairCollection:
    """Pairs of the lengths, no two with one prompt."""
    return PairCollection([PairsInMemory([[range(n, n + size) for size in sizes] for n, sizes in enumerate(LENGTHS)])])  # type: ignore[arg-type, list-item, misc]


def layout(capacity: int, **others: Any) -> BatchLayout:
    return BatchLayout(0, 1, capacity, BY_TOKENS, **others)


LAYOUTS = [
    {},
    {"share_prompts": False},
    {"with_rejected": False},
    {"unconditional": "bos", "unconditional_in_rows": True, "bos_token_id": 1},
    {"unconditional": "none", "unconditional_in_rows": True, "share_prompts": False},
]


@pytest.mark.parametrize("others", LAYOUTS)
def test_just_what_does_not_fit_is_refused(others: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    some = pairs()
    sizes = layout(1, **others).gradient_tokens(np.array(LENGTHS))
    most = int(sizes.max())
    assert largest_pair(some, layout(1, **others)) == most
    check_pairs_fit(some, layout(most, **others))
    with pytest.raises(ConfigError, match=f"tokens 5: pair {sizes.argmax()} of the pairs in memory needs {most} tokens"):
        check_pairs_fit(some, layout(5, **others), name="tokens")
    with pytest.raises(ConfigError, match="1 pairs in all do not fit"):
        check_pairs_fit(some, layout(most - 1, **others))
    monkeypatch.delattr(PairCollection, "all_lengths")
    check_pairs_fit(some, layout(2 * 2 * LONGEST, **others))


def test_mismatched_pairs_fit_too() -> None:
    some = pairs()
    some.match_anew()
    most = int(layout(1).conditional_tokens(some.mismatched.lengths_of(np.arange(3))).max())  # type: ignore[union-attr]
    own = int(layout(1).conditional_tokens(np.array(LENGTHS)).max())
    assert largest_pair(some, layout(1)) == max(most, own)
    # That each of them fits is known without a look at them.
    assert largest_pair(some, layout(2 * LONGEST)) == 2 * LONGEST
    check_pairs_fit(some, layout(max(most, own)))
    with pytest.raises(ConfigError, match="needs"):
        check_pairs_fit(some, layout(max(most, own) - 1))
