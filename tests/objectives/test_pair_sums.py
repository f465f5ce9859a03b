from __future__ import annotations

import torch

from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps


def test_every_field_reaches_the_objective() -> None:
    table = torch.arange(12, dtype=torch.float64).view(6, 2)
    policy = PairSums(table[:3].float().requires_grad_(), table[:3].float())
    logps = pair_logps(
        policy,
        mean_chosen_length=torch.tensor(4.0),
        unconditional=PairSums(table[3:].float().requires_grad_(), table[:3].float()),
        reference=table[1:4],
        extrapolated=table[2:5],
        interpolated=table[:3],
        columns={"margin": table[:3, 1]},
        batch={"z": torch.tensor(2.0, dtype=torch.float64)},
    )
    assert logps.chosen_logps.tolist() == [0, 2, 4]
    assert logps.rejected_logps.requires_grad
    assert logps.uncond_chosen_logps is not None
    assert not logps.uncond_chosen_logps.requires_grad
    found = {
        name: getattr(logps, name).tolist() for name in ("uncond_chosen_logps", "uncond_rejected_lengths", "ref_rejected_logps")
    }
    assert found == {
        "uncond_chosen_logps": [6, 8, 10],
        "uncond_rejected_lengths": [1, 3, 5],
        "ref_rejected_logps": [3, 5, 7],
    }
    assert logps.extrapolated_chosen_logps is not None
    assert logps.extrapolated_chosen_logps.tolist() == [4, 6, 8]
    assert logps.interpolated_rejected_logps is not None
    assert logps.interpolated_rejected_logps.dtype == torch.float32
    assert logps.columns["margin"].tolist() == [1, 3, 5]
    assert logps.batch["z"].dtype == torch.float32


def test_chosen_responses_alone_are_a_table_of_one_column() -> None:
    chosen = PairSums(torch.tensor([[-3.0], [-5.0]], requires_grad=True), torch.tensor([[2.0], [4.0]]))
    logps = pair_logps(chosen, mean_chosen_length=torch.tensor(3.0), unconditional=chosen)
    assert (logps.chosen_logps.tolist(), logps.chosen_lengths.tolist()) == ([-3, -5], [2, 4])
    # Nobody reads them, but some divide by their length.
    assert (logps.rejected_logps.tolist(), logps.rejected_lengths.tolist()) == ([0, 0], [1, 1])
    assert logps.uncond_chosen_logps is not None
    assert logps.uncond_rejected_logps is not None
    assert (logps.uncond_chosen_logps.tolist(), logps.uncond_rejected_logps.tolist()) == ([-3, -5], [0, 0])
    assert (logps.chosen_logps.requires_grad, logps.uncond_chosen_logps.requires_grad) == (True, False)
