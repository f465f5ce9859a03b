"""Adapters put into the weights: the model without them then computes what the one with them did."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.lora.merging import merge_adapter
from megatron_rmipo.model.lora.switch import computing_with
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, PeftModel, write_model
from tests.integration.adapters.worlds import build_adapted, fill, losses_of
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, run_at_layouts

CASES = [Case(name, model=name, tokens_per_microbatch=150) for name in ("shared", "experts", "dora", "phi3")]


def merged_and_not(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> Any:
    """Losses with the adapter, without it, and without it after it was merged."""
    where = Path(folder)
    state = build_adapted(case, where, groups)
    fill(state, case, where, torch.load(where / case.model / "factors.pt", weights_only=False), groups)
    losses = functools.partial(losses_of, case, state, pairs, groups, "rmipo", None)
    found = [losses()]
    with computing_with(state.policy, None):
        found.append(losses())
        merge_adapter(state.policy)
        found.append(losses())
    return found


@pytest.mark.dist
def test_a_merged_adapter_is_in_the_weights_of_every_layer_and_expert(tmp_path: Path) -> None:
    for case in CASES:
        dense = PeftModel(write_model(tmp_path / case.model / "model", FORMS[case.model]), FORMS[case.model])
        dense.draw()
        torch.save(dense.factors(), tmp_path / case.model / "factors.pt")
    run = functools.partial(run_at_layouts, merged_and_not)
    (results,) = run_distributed(run, 1, CASES, str(tmp_path), collection(make_pairs(4)))
    for case, (adapted, plain, merged) in zip(CASES, results, strict=True):
        assert float((adapted - plain).abs().max()) > 0.1, case.name
        torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5, msg=case.name)
