"""Which evaluation is the best, when a run stops, and that a resumed run knows both."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from megatron_rmipo.config.flags.evaluation import EvaluationConfig, parse_early_stop, parse_eval_data, parse_metric
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.training.course.selection import Selection
from megatron_rmipo.training.progress import Progress

BOTH = EvaluationConfig(keep_best="rewards/accuracies", early_stop="chat:nll/chosen:2")


def evaluation(accuracy: float | None, nll: float) -> dict[str, dict[str, Any]]:
    return {"eval": {"rewards/accuracies": accuracy}, "eval/chat": {"nll/chosen": nll}}


def as_written(step: int, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """As metrics.jsonl has them."""
    return [{"kind": kind, "step": step, **record} for kind, record in records.items()]


RUN = {
    2: evaluation(0.5, 3.0),
    4: evaluation(0.75, 2.0),
    6: evaluation(math.nan, 2.5),
    8: evaluation(0.75, 2.0),
    10: evaluation(0.8, 1.0),
}


@pytest.mark.parametrize(
    ("text", "held_out", "name", "less"),
    [
        ("rewards/accuracies", "", "rewards/accuracies", False),
        ("loss", "", "loss", True),
        ("dpo/loss", "", "dpo/loss", True),
        ("chat:nll/chosen", "chat", "nll/chosen", True),
        ("logps/chosen", "", "logps/chosen", False),
        ("-chat:gamma/p50", "chat", "gamma/p50", True),
    ],
)
def test_which_way_a_metric_is_better(text: str, held_out: str, name: str, less: bool) -> None:
    metric = parse_metric(text)
    assert (metric.held_out, metric.name, metric.less_is_better) == (held_out, name, less)
    assert metric.is_better(1.0, 2.0) == less
    assert metric.is_better(2.0, 1.0) != less
    assert not metric.is_better(1.0, 1.0)
    assert metric.is_better(1.0, None)
    assert not metric.is_better(math.nan, None)


def test_the_flags_say_what_they_expect() -> None:
    assert parse_eval_data(["chat=data/chat", "a-b_1=x=y"]) == {"chat": "data/chat", "a-b_1": "x=y"}
    for values in (["data/chat"], ["=x"], ["a b=x"], ["first=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--eval-data"):
            parse_eval_data(values)
    assert parse_early_stop("chat:loss:3")[1] == 3
    for text in ("loss", "loss:0", "loss:x", ":3"):
        with pytest.raises(ConfigError, match="--early-stop"):
            parse_early_stop(text)
    with pytest.raises(ConfigError, match=r"--keep-best a b:loss"):
        parse_metric("a b:loss")


def test_the_best_is_the_first_of_the_best_and_the_run_stops_after_so_many_without_a_better_one() -> None:
    selection = Selection(BOTH, Progress())
    found = {}
    for step, records in RUN.items():
        found[step] = selection.look_at(step, records)
        if selection.stops:
            break
    assert found == {2: ["keep_best", "early_stop"], 4: ["keep_best", "early_stop"], 6: [], 8: []}
    assert selection.best is not None
    assert (selection.best.step, selection.best.value) == (4, 0.75)
    assert selection.said() == "early stop: chat:nll/chosen was best at step 4 (2.0000), and no better at 2 evaluations since"


@pytest.mark.parametrize("saved_before", [False, True])
@pytest.mark.parametrize("stopped_at", [2, 4, 6])
def test_a_resumed_run_goes_on_with_what_it_has_seen(stopped_at: int, saved_before: bool) -> None:
    whole, progress = Selection(BOTH, Progress()), Progress()
    selection, saved = Selection(BOTH, progress), Progress()
    for step, records in RUN.items():
        whole.look_at(step, records)
        if step <= stopped_at:
            # A checkpoint of this step is saved before the evaluation, or that of the best after it.
            progress.step = step
            before = copy.deepcopy(progress)
            selection.look_at(step, records)
            saved = before if saved_before else copy.deepcopy(progress)
    # As a checkpoint has it.
    resumed = Selection(BOTH, Progress(**json.loads(json.dumps(dataclasses.asdict(saved)))))
    resumed.look_back([record for step, records in RUN.items() if step <= stopped_at for record in as_written(step, records)])
    for step, records in RUN.items():
        if step > stopped_at:
            resumed.look_at(step, records)
    assert (resumed.best, resumed.stops, resumed.said()) == (whole.best, whole.stops, whole.said())


def test_another_metric_is_watched_from_where_the_run_stands() -> None:
    progress = Progress()
    selection = Selection(BOTH, progress)
    for step in (2, 4, 6):
        selection.look_at(step, RUN[step])
    progress.step = 6
    other = Selection(dataclasses.replace(BOTH, keep_best="chat:nll/chosen"), progress)
    other.look_back([record for step in (2, 4, 6) for record in as_written(step, RUN[step])])
    assert other.best is not None
    assert (other.best.step, other.best.value) == (6, 2.5)
    assert progress.watched["early_stop"]["step"] == 4
    assert Selection(EvaluationConfig(), progress).best is None
    assert progress.watched == {}


def test_a_half_written_evaluation_is_not_taken_for_one() -> None:
    selection = Selection(BOTH, Progress())
    selection.look_back(as_written(2, RUN[2])[:1])
    assert selection.best is not None
    assert selection.best.step == 0


def test_a_metric_that_evaluations_do_not_have_is_refused_with_those_that_they_have() -> None:
    selection = Selection(EvaluationConfig(early_stop="accuracy:1"), Progress())
    with pytest.raises(ConfigError) as refused:
        selection.check({"eval": {"step": 1, "loss": 1.0, "loss/se": 0.1, "rewards/margins": 0.5}})
    assert str(refused.value) == ("--early-stop accuracy: evaluations have no metric accuracy. They have: loss, rewards/margins.")
