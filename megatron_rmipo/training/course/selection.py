"""Which evaluation of a run is its best so far, and whether the run has stopped getting better.

Every rank holds the same: what evaluations say is told to all of them by the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rmipo.config.flags.evaluation import EvaluationConfig, Metric, parse_early_stop, parse_metric
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.reporter import evaluation_kind
from megatron_rmipo.training.progress import Progress

Record = Mapping[str, Any]


@dataclasses.dataclass
class Watch:
    """What a run has seen of one metric; plain numbers, which a checkpoint holds.

    Attributes:
        metric: as the flag gives it.
        step: of its best evaluation; 0 while there is none.
        value: there.
        since: evaluations since then, none of them better.
        seen: step of the last evaluation that was looked at.
    """

    metric: str
    step: int = 0
    value: float | None = None
    since: int = 0
    seen: int = 0

    def look_at(self, metric: Metric, step: int, value: float) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        is_best = metric.is_better(value, self.value)
        self.seen = step
        if is_best:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return is_best


class Selection:
    """What ``--keep-best`` and ``--early-stop`` have seen, kept in the run's progress.

    The evaluation before the first step does not count: nothing is trained there.

    Args:
        flags: that name the metrics.
        progress: of the run. What it holds of another metric than the flag names is forgotten: from there on the flag's is
            watched.
    """

    def __init__(self, flags: EvaluationConfig, progress: Progress) -> None:
        self._metrics: dict[str, Metric] = {}
        self._patience = 0
        if flags.keep_best is not None:
            self._metrics["keep_best"] = parse_metric(flags.keep_best)
        if flags.early_stop is not None:
            self._metrics["early_stop"], self._patience = parse_early_stop(flags.early_stop)
        for name in list(progress.watched):
            if name not in self._metrics or progress.watched[name]["metric"] != self._metrics[name].text:
                del progress.watched[name]
        # The evaluation of the step that a run goes on from may not be in its progress, which is saved before it.
        fresh = {name: Watch(metric.text, seen=max(0, progress.step - 1)) for name, metric in self._metrics.items()}
        self._watches = {name: Watch(**progress.watched[name]) if name in progress.watched else fresh[name] for name in fresh}
        self._progress = progress

    @property
    def best(self) -> Watch | None:
        """What ``--keep-best`` has seen; None where nothing is kept for it."""
        return self._watches.get("keep_best")

    @property
    def stops(self) -> bool:
        """Whether the run is over by ``--early-stop``."""
        watch = self._watches.get("early_stop")
        return watch is not None and watch.since >= self._patience

    def forget_best(self) -> None:
        """Begin anew with the next evaluation: the checkpoint of the best so far is not there."""
        watch = self._watches["keep_best"]
        self._watches["keep_best"] = Watch(watch.metric, seen=watch.seen)
        self._keep()

    def check(self, records: Mapping[str, Record]) -> None:
        """Refuse a metric that evaluations do not have.

        Args:
            records: kind -> record of an evaluation, of every held-out set.

        Raises:
            ConfigError: naming those that there are.
        """
        for name, metric in self._metrics.items():
            record = records[evaluation_kind(metric.held_out)]
            if metric.name not in record:
                there = ", ".join(sorted(other for other in record if not other.endswith(("/se", "/n")) and other != "step"))
                raise ConfigError(
                    f"--{name.replace('_', '-')} {metric.text}: evaluations have no metric {metric.name}. They have: {there}."
                )

    def look_at(self, step: int, records: Mapping[str, Record]) -> list[str]:
        """Take in the evaluation of a step.

        Args:
            step: of the evaluation; one that was looked at before is passed over.
            records: kind -> record, of every held-out set; a value may be None, for one that is not finite.

        Returns:
            The names of the flags, as fields, for whose metric it is the best so far.
        """
        found = []
        for name, watch in self._watches.items():
            if step > watch.seen:
                value = records[evaluation_kind(self._metrics[name].held_out)].get(self._metrics[name].name)
                if watch.look_at(self._metrics[name], step, math.nan if value is None else float(value)):
                    found.append(name)
        self._keep()
        return found

    def look_back(self, evaluations: Sequence[Record]) -> None:
        """Take in evaluations that metrics.jsonl holds, in order, and a checkpoint does not, which was saved before them."""
        steps: dict[int, dict[str, Record]] = {}
        for record in evaluations:
            steps.setdefault(record["step"], {})[record["kind"]] = record
        needed = {evaluation_kind(metric.held_out) for metric in self._metrics.values()}
        for step, records in steps.items():
            if needed <= records.keys():
                self.look_at(step, records)

    def said(self) -> str:
        """Why the run is over, where it is."""
        watch = self._watches["early_stop"]
        best = f"best at step {watch.step} ({watch.value:.4f})" if watch.value is not None else "never a number"
        return f"early stop: {watch.metric} was {best}, and no better at {watch.since} evaluations since"

    def _keep(self) -> None:
        self._progress.watched = {name: dataclasses.asdict(watch) for name, watch in self._watches.items()}
