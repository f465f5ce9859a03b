"""From sums of log-probs by pair, whoever made them, to what an objective is called with.

Shape letter: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from megatron_rmipo.objectives.base import PairLogps


@dataclasses.dataclass(frozen=True)
class PairSums:
    """Responses of P pairs, scored by one model.

    Attributes:
        logps: fp32 ``[P, 2]``, sum of log-probs over the scored tokens of (chosen, rejected).
        lengths: fp32 ``[P, 2]``, their numbers of scored tokens; without gradient.
    """

    logps: Tensor
    lengths: Tensor

    def __getitem__(self, which: Any) -> PairSums:
        """Those of some pairs; of some columns too, where there are more than two."""
        return PairSums(self.logps[which], self.lengths[which])


def pair_logps(
    policy: PairSums,
    *,
    mean_chosen_length: Tensor,
    unconditional: PairSums | None = None,
    reference: Tensor | None = None,
    extrapolated: Tensor | None = None,
    interpolated: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    batch: Mapping[str, Tensor] | None = None,
) -> PairLogps:
    """What an objective is called with; see there what each field means.

    Tables may be ``[P, 1]``, chosen responses alone, for objectives that read no others.

    Args:
        policy: sums of the responses to their prompts; the only argument whose gradient is kept.
        mean_chosen_length: scored chosen tokens a pair, over the global batch; a scalar.
        unconditional: sums of the responses alone.
        reference, extrapolated, interpolated: fp32 ``[P, 2]``, sums of (chosen, rejected).
        columns: ``[P]`` each.
        batch: what ``prepare`` gave: scalars, or ``[P]`` values of these pairs.
    """
    fields = _sides("{}_logps", policy.logps) | _sides("{}_lengths", policy.lengths, absent=1.0)
    if unconditional is not None:
        fields |= _sides("uncond_{}_logps", unconditional.logps.detach()) | _sides("uncond_{}_lengths", unconditional.lengths)
    for prefix, sums in {"ref": reference, "extrapolated": extrapolated, "interpolated": interpolated}.items():
        if sums is not None:
            fields |= _sides(prefix + "_{}_logps", sums.detach())
    return PairLogps(
        mean_chosen_length=mean_chosen_length,
        columns={name: values.float() for name, values in (columns or {}).items()},
        batch={name: values.float() for name, values in (batch or {}).items()},
        **fields,
    )


def _sides(name: str, table: Tensor, *, absent: float = 0.0) -> dict[str, Any]:
    """Both columns by name; rejected responses that nobody reads have the value ``absent``, by which may be divided."""
    chosen, rejected = pad(table.float(), (0, 2 - table.shape[1]), value=absent).unbind(1)
    return {name.format("chosen"): chosen, name.format("rejected"): rejected}
