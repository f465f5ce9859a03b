"""How far a run is."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        consumed_pairs: pairs seen.
        skipped_steps: steps whose loss or gradient was not finite.
        global_batch_size, seed, num_pairs: what the order of pairs depends on besides; a resumed run must not change them.
        objective, options: the objective's name and options, empty where an older version did not save them; a resumed run must
            not change them.
        reference: fingerprint of the reference's weights, "" where there is none; a resumed run must not change it.
        data, data_flags: fingerprint of the pairs to train on in their stored order, and the flags that named them; "" where an
            older version did not save them. A resumed run may find the same pairs under another name.
        held_out: fingerprint of the pairs to evaluate on, "" for none; other ones make evaluations that cannot be compared.
        eval_data: of each further held-out set the fingerprint of its pairs, by its name.
        watched: what ``--keep-best`` and ``--early-stop`` have seen, see :mod:`megatron_rmipo.training.course.selection`.
        order: name of the order of pairs, "" where an older version did not save it; a resumed run keeps it. See
            :mod:`megatron_rmipo.data.batches.order_names`.
    """

    step: int = 0
    consumed_pairs: int = 0
    skipped_steps: int = 0
    global_batch_size: int = 0
    seed: int = 0
    num_pairs: int = 0
    objective: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = ""
    data: str = ""
    data_flags: str = ""
    held_out: str = ""
    order: str = ""
    eval_data: dict[str, str] = dataclasses.field(default_factory=dict)
    watched: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
