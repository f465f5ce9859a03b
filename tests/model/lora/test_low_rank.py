"""What Megatron is told of an adapter's tensors."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.lora.held import held_factors
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, write_model
from tests.integration.adapters.worlds import build_adapted
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, run_at_layouts

SP_2 = {"tp": 2, "sequence_parallel": True}
CASES = [
    Case("experts whole, half of them on a rank", model="experts", ep=2, etp=1, **SP_2),  # type: ignore[arg-type]
    Case("experts whole, all on each rank", model="experts", etp=1, **SP_2),  # type: ignore[arg-type]
    Case("experts cut", model="experts", etp=2, **SP_2),  # type: ignore[arg-type]
]


def counted(case: Case, folder: str, _pairs: PairCollection, groups: ProcessGroups) -> dict[tuple[str, int, str], int]:
    """Numbers of each expert's factor that the norm of gradients takes from the ranks over which it is summed."""
    found: dict[tuple[str, int, str], int] = {}
    for held in held_factors(build_adapted(case, Path(folder), groups).policy):
        if held.projection.expert is not None:
            name = held.projection.name, held.projection.expert, held.kind
            found[name] = held.parameter.numel() * param_is_not_tensor_parallel_duplicate(held.parameter, groups.tp)
    ranks: list[dict[tuple[str, int, str], int]] = [{} for _ in range(2)]
    dist.all_gather_object(ranks, found)
    if case.ep == 1 and case.etp == 1:  # each rank has a sum of its own
        assert ranks[0] == ranks[1]
        return found
    return {name: sum(rank.get(name, 0) for rank in ranks) for name in {**ranks[0], **ranks[1]}}


@pytest.mark.dist
def test_the_norm_counts_each_number_of_an_expert_once(tmp_path: Path) -> None:
    write_model(tmp_path / "experts" / "model", FORMS["experts"])
    for results in run_distributed(
        functools.partial(run_at_layouts, counted), 2, CASES, str(tmp_path), collection(make_pairs(2))
    ):
        whole = results[0]
        assert min(whole.values()) > 0
        for case, found in zip(CASES, results, strict=True):
            assert found == whole, case.name
