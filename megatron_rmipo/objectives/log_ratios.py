"""Log-ratios of policy and reference, what the rewards of the DPO family are made of.

Shape letter: P pairs.
"""

from __future__ import annotations

from torch import Tensor

from megatron_rmipo.objectives.base import PairLogps


def reference_log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """``(Lw - Rw, Ll - Rl)``: log-ratio of policy and reference of the chosen and the rejected response.

    Sums over the scored tokens, fp32 ``[P]``, with gradient. The objective must declare ``reference``.
    """
    assert logps.ref_chosen_logps is not None
    assert logps.ref_rejected_logps is not None
    return logps.chosen_logps - logps.ref_chosen_logps, logps.rejected_logps - logps.ref_rejected_logps
