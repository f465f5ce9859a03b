"""What a pass over rows says where it ends early."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rmipo.data.batches.packing import pack_pairs
from megatron_rmipo.memory.readings import PackOutOfMemory
from megatron_rmipo.passes import rows
from tests.integration.problem import make_pairs


def test_memory_that_ran_out_in_what_fills_a_group_up_is_told_of_the_row_that_it_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows through two interleaved stages, which take four."""
    pairs = make_pairs(3)
    packed = [pack_pairs([pair], [number]) for number, pair in enumerate(pairs)]
    chunks = [torch.nn.Module(), torch.nn.Module()]
    for chunk in chunks:
        chunk.config = SimpleNamespace(pipeline_model_parallel_size=2)  # type: ignore[assignment]
    seen = []

    def output(model: Any, row: Any, *_: Any, **further: Any) -> torch.Tensor:
        seen.append(row)
        if len(seen) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(row.num_scored)

    def schedule(*, forward_step_func: Callable[..., Any], data_iterator: Any, num_microbatches: int, **further: Any) -> None:
        for _ in range(num_microbatches):
            forward_step_func(data_iterator[0], chunks[0])

    for name, stand_in in {
        "_schedule": lambda chunks: schedule,
        "messages_in_order": lambda chunks: {},
        "check_lengths": lambda chunks, rows: None,
        "row_output": output,
    }.items():
        monkeypatch.setattr(rows, name, stand_in)
    with pytest.raises(PackOutOfMemory, match="pack 1 of 3") as told:
        rows.run_rows(chunks, packed, lambda row, output: None, name="scoring pass", backward=False)
    assert told.value.rows[told.value.number] is packed[0]
    assert seen[3].pair_numbers.tolist() == [-1, -1]
