"""An objective whose losses count as much as each pair's weight says.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, Objective, PairLogps, State
from megatron_rmipo.objectives.contract import check_output


class PairWeighted(Objective):
    """``L = weight * L_objective``, the weight that of the pair, from the data's column.

    The batch loss is the mean over the pairs still: weights are not divided by their mean, so that what a pair counts does not
    depend on the others of its batch. What the objective makes of the batch as a whole, and its metrics, do not see the weights.

    Args:
        objective: what is weighted.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.config)
        self._objective = objective
        self.name = objective.name  # type: ignore[misc]

    @property
    def parts(self) -> tuple[Objective, ...]:
        """Those of the objective."""
        return self._objective.parts

    @property
    def needs(self) -> LogpNeeds:
        """What the objective needs, and the weights."""
        needs = self._objective.needs
        return dataclasses.replace(needs, columns=tuple(dict.fromkeys((*needs.columns, "weight"))))

    def initial_state(self) -> State:
        """The objective's."""
        return self._objective.initial_state()

    def prepare(self, batch: BatchLogps, state: State) -> dict[str, Tensor]:
        """What the objective prepares."""
        return self._objective.prepare(batch, state)

    def advance(self, state: State, prepared: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> State:
        """The objective's state after the step."""
        return self._objective.advance(state, prepared, metrics)

    def remark(self, metrics: Mapping[str, Tensor]) -> str | None:
        """The objective's."""
        return self._objective.remark(metrics)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Weighted losses, metrics as they are.

        Raises:
            ConfigError: the objective's losses or metrics are not one value per pair.
        """
        output = self._objective(logps)
        weights = logps.columns["weight"]
        check_output(self._objective, output, weights.shape[0])
        return dataclasses.replace(output, losses=weights * output.losses)
