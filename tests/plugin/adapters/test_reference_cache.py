"""Scores beside the data are found for the pairs that are asked for, and those that miss some are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import ScoreKey, ScoreWriter, data_fingerprint, score_directory
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.plugin.adapters.reference_cache import _find_all, _open_all
from tests.integration.data import write_pairs


def test_rows_that_no_pair_stands_in_need_no_scores(tmp_path: Path) -> None:
    prefix = str(write_pairs(tmp_path / "pairs"))
    store = PairStore(prefix)
    key = ScoreKey(data_fingerprint(prefix), store.manifest.tokenizer.fingerprint, "reference", "float32", "matched")
    directory, rows = score_directory(prefix, None, key), np.array([45, 46, 47])
    with ScoreWriter(directory, key, len(store)) as writer:
        writer.write(rows, np.arange(-6, 0, dtype=np.float32).reshape(3, 2))
    some, last_five = (PairCollection([store]).split(number / 48)[1] for number in (3, 5))
    some.reference_scores = _open_all(some, _find_all(some, "matched", "dpo", None))
    found = some.scores_of(np.arange(3))
    assert found is not None
    assert found.tolist() == [[-6.0, -5.0], [-4.0, -3.0], [-2.0, -1.0]]
    for pairs, num_missing in ((PairCollection([store]), 45), (last_five, 2)):
        with pytest.raises(ConfigError, match=rf"not all there yet, {num_missing} of 48 are missing. Run tools/score_pairs\.py"):
            _find_all(pairs, "matched", "dpo", None)
