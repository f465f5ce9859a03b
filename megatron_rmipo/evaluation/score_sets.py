"""Log-probs of sets under a model and its reference, each kept as :mod:`megatron_rmipo.scoring.score` keeps them.

Every function here is collective unless it says otherwise: all ranks call it together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.store.alone import ResponsesAlone
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.evaluation.criteria import ScoredSet, Sums, Wanted
from megatron_rmipo.evaluation.sets import EvaluationSet
from megatron_rmipo.memory.peak import forget_peak_memory
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest
from megatron_rmipo.scoring.score import Rows, ScoreTask, find_missing, plan_scores, score_rows


@dataclasses.dataclass(frozen=True)
class OpenSet:
    """A set with its stored pairs.

    Attributes:
        asked: the set.
        store: its pairs.
        context_token_id: the token before responses alone; None for nothing.
    """

    asked: EvaluationSet
    store: PairStore
    context_token_id: int | None

    def rows_of_policy(self, wanted: Wanted) -> list[Rows]:
        """What the model scores."""
        alone = [ResponsesAlone(self.store, context) for context in wanted.contexts(self.context_token_id)]
        return [self.store, *alone, *self._mismatched(wanted)]

    def rows_of_reference(self, wanted: Wanted) -> list[Rows]:
        """What the reference scores."""
        reads = "log_ratio" in wanted.names or (wanted.objective is not None and wanted.objective.needs.reference)
        return [*([self.store] if reads else []), *self._mismatched(wanted)]

    def _mismatched(self, wanted: Wanted) -> list[Rows]:
        needed = wanted.objective is not None and wanted.objective.needs.mismatched
        return [MismatchedStore(self.store)] if needed else []


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How this rank scores.

    Attributes:
        layout: how rows are cut.
        groups: the process groups of this rank.
        memory: explains, should memory run out.
        stop: asked before each block of rows.
        bf16: dtype of the models.
        cache: directory of scores; None: beside the data.
        names: of the sets, by their prefixes.
    """

    layout: BatchLayout
    groups: ProcessGroups
    memory: MemoryReport
    stop: StopRequest
    bf16: bool
    cache: str | None
    names: Mapping[str, str]

    def score(self, rows: Sequence[Rows], fingerprint: str, load: Callable[[], Policy]) -> list[ScoreTask]:
        """Compute what is missing of the scores of ``rows`` under one model, which is loaded where something is.

        Raises:
            RunStopped: a signal came; what was scored is kept.
            DataError: a score is not finite, or cannot be written.
        """
        tasks = plan_scores(rows, reference=fingerprint, bf16=self.bf16, cache=self.cache, groups=self.groups)
        missing = find_missing(tasks, self.groups)
        if missing:
            with self.memory.explaining("loading the model", trains=False):
                model = load()
            for part in missing:
                name = self.names[part.task.rows.prefix]
                score_rows(model, part, self.layout, self.groups, self.memory, self.stop, name)
            del model
            forget_peak_memory()
        return tasks


def collect(one: OpenSet, wanted: Wanted, policy: Sequence[ScoreTask], reference: Sequence[ScoreTask]) -> ScoredSet:
    """What was scored of a set, its pairs that count alone. Of one rank by itself.

    Args:
        one: the set.
        wanted: what it is ranked by.
        policy, reference: the tasks of its rows, in the order of :meth:`OpenSet.rows_of_policy` and of the reference's.
    """
    pairs = one.asked.pairs
    lengths = one.store.lengths_of(pairs)[:, 1:].astype(np.int64)
    tables = {task.key.kind: np.asarray(task.open()[pairs]) for task in policy}
    others = {task.key.kind: np.asarray(task.open()[pairs]) for task in reference}
    alone = {
        context: Sums(tables[ResponsesAlone(one.store, context).kind], lengths if context is not None else lengths - 1)
        for context in wanted.contexts(one.context_token_id)
    }
    return ScoredSet(
        policy=Sums(tables["matched"], lengths),
        alone=alone,
        reference=others.get("matched"),
        mismatched=tables.get("mismatched"),
        ref_mismatched=others.get("mismatched"),
        columns=_columns(one, wanted, pairs),
    )


def _columns(one: OpenSet, wanted: Wanted, pairs: np.ndarray) -> Mapping[str, np.ndarray]:
    names = () if wanted.objective is None else wanted.objective.needs.columns
    there = one.store.manifest.pair_columns
    return {name: np.array(one.store.values[pairs, there.index(name)]) for name in names}
