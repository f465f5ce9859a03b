"""Log-probs of the reference in Megatron-LM's loop: where a run that goes on finds them, and what they are then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.plugin.adapters.megatron_lm_data import _find_scores, _map_scores, _write_scores

NAME = "reference/matched-1.npy"


def test_a_run_that_goes_on_maps_what_lies_under_save_or_load(tmp_path: Path) -> None:
    store = PairsInMemory([([1], [2], [3])] * 5)
    args = SimpleNamespace(save=str(tmp_path / "new"), load=str(tmp_path / "old"))
    with pytest.raises(ConfigError, match=f"the pairs in memory under the model that it began with are not in {NAME}"):
        _find_scores(NAME, store, args)
    scores = np.arange(10, dtype=np.float32).reshape(5, 2)
    _write_scores(tmp_path / "old" / NAME, scores)
    # Of other data.
    _write_scores(tmp_path / "new" / NAME, scores[:4])
    found = _map_scores(_find_scores(NAME, store, args))
    np.testing.assert_array_equal(found, scores)
    assert not found.flags.owndata
    (tmp_path / "new" / NAME).write_bytes(b"no array")
    with pytest.raises(DataError, match=r"new/reference/matched-1\.npy: not readable as an array"):
        _find_scores(NAME, store, args)
