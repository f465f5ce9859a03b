"""What every run tells of its responses, whatever its objective returns."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps
from megatron_rmipo.objectives.metrics import output_of
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.objectives.sft import SftConfig
from tests.objectives.batches import with_prepared
from tests.objectives.pairs import make_pairs, random_pairs

COMMON = {"logps/chosen", "logps/rejected", "nll/chosen", "tokens/chosen", "tokens/rejected"}


class Own(Objective):
    """Returns a loss alone, or metrics that it is made with."""

    name: ClassVar[str] = "own"
    Config: ClassVar[type] = SftConfig

    def __init__(self, metrics: dict[str, Any] | None = None, distributions: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.metrics, self.distributions = metrics or {}, distributions

    def __call__(self, logps: PairLogps) -> LossOutput:
        return LossOutput(-logps.chosen_logps, self.metrics, self.distributions)


class Unpaired(Own):
    @property
    def needs(self) -> LogpNeeds:
        return LogpNeeds(unpaired=True)


class ChosenAlone(Own):
    @property
    def needs(self) -> LogpNeeds:
        return LogpNeeds(rejected=False)


def told(objective: Objective, pairs: PairLogps) -> dict[str, list[float]]:
    output = output_of(objective, pairs)
    assert output.losses.requires_grad
    assert not any(values.requires_grad for values in output.metrics.values())
    return {name: values.tolist() for name, values in output.metrics.items()}


def test_an_objective_that_returns_a_loss_alone_gets_them() -> None:
    pairs = make_pairs([-6.0, -1.0], [-10.0, -4.0], ([3, 1], [4, 2]))
    metrics = told(Own(), pairs)
    assert metrics.pop("nll/chosen") == pytest.approx([3.0, 0.5])  # their mean is 7 nats over 4 tokens
    assert metrics == {
        "logps/chosen": [-2.0, -1.0],
        "logps/rejected": [-2.5, -2.0],
        "tokens/chosen": [3.0, 1.0],
        "tokens/rejected": [4.0, 2.0],
    }
    assert output_of(Own(distributions=("logps/chosen",)), pairs).distributions == ("logps/chosen",)


def test_what_it_returns_itself_wins() -> None:
    pairs = random_pairs(3, seed=1)
    own = told(Own({"logps/chosen": torch.tensor([1.0, 2.0, 3.0]), "gap": torch.zeros(3)}), pairs)
    assert own["logps/chosen"] == [1.0, 2.0, 3.0]
    assert set(own) == COMMON | {"gap"}
    with pytest.raises(ConfigError, match="own: 'gap' is"):
        told(Own({"gap": torch.zeros(())}), pairs)


def test_a_row_without_a_response_has_none_of_it() -> None:
    metrics = told(Unpaired(), make_pairs([-6.0, 0.0], [0.0, -5.0], ([4, 0], [0, 2])))
    nan = math.nan
    assert metrics["logps/chosen"] == pytest.approx([-1.5, nan], nan_ok=True)
    assert metrics["tokens/chosen"] == pytest.approx([4.0, nan], nan_ok=True)
    assert metrics["logps/rejected"] == pytest.approx([nan, -2.5], nan_ok=True)
    # 6 nats over 4 chosen tokens: the mean over all rows, 0 where there is none.
    assert sum(metrics["nll/chosen"]) / 2 == pytest.approx(1.5)


def test_nothing_is_told_of_rejected_responses_that_nobody_reads() -> None:
    assert set(told(ChosenAlone(), random_pairs(3, seed=2))) == {name for name in COMMON if "rejected" not in name}


# The pairs of these tests have neither mismatched ones nor mixtures of logits.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("kto", "epsilon_dpo")])
def test_every_objective_of_ours_leaves_them_to_whoever_runs_it(name: str) -> None:
    objective = build_objective(name, {})
    pairs = with_prepared(objective, random_pairs(5, seed=3))
    assert not set(objective(pairs).metrics) & COMMON
    assert COMMON - set(told(objective, pairs)) == ({"logps/rejected", "tokens/rejected"} if name == "sft" else set())
