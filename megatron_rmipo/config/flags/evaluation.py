"""What a run looks at between its steps: the flags, and what they say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from megatron_rmipo.config.options import described, option
from megatron_rmipo.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Files of the main held-out set have this in the place of a name.
_TAKEN = "first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation: further held-out sets, the best checkpoint, early stopping, answers to prompts."""

    eval_data: list[str] | None = dataclasses.field(
        default=None,
        metadata=described(
            "Further held-out sets, each evaluated at every evaluation under its name, beside that of --valid-data-path or "
            "--split or without it.",
            "NAME=PREFIX",
        ),
    )
    keep_best: str | None = option(
        None,
        "Keep the checkpoint of the evaluation with the best METRIC, whatever --save-interval and --keep-last say: a metric of "
        "evaluations such as rewards/accuracies, of a set of --eval-data as NAME:METRIC. More is better, but of loss and nll/*; "
        "a minus before it says that less is (--keep-best=-gamma).",
        "METRIC",
    )
    early_stop: str | None = option(
        None, "End the run after so many evaluations without a better METRIC, as of --keep-best.", "METRIC:PATIENCE"
    )
    sample_prompts: str | None = option(
        None,
        "Prompts that the policy answers as it trains, into samples.jsonl: a file of JSON lines with prompt or messages, or of "
        "plain text, a prompt a line.",
        "FILE",
    )
    sample_interval: int | None = option(
        None, "With --sample-prompts: answer them every this many steps, too; unset: only at the start and at the end."
    )
    sample_length: int = option(128, "With --sample-prompts: most tokens of an answer.")
    sample_temperature: float = option(0.0, "With --sample-prompts: of the sampling, seeded by --seed; 0: greedy.")

    @property
    def sets(self) -> dict[str, str]:
        """Name of each further held-out set -> PREFIX of its data."""
        return parse_eval_data(self.eval_data or [])


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of an evaluation, and which way it is better.

    Attributes:
        text: as it was given.
        held_out: name of the held-out set, "" for the main one.
        name: of the metric, as in metrics.jsonl.
        less_is_better: whether lower values are.
    """

    text: str
    held_out: str
    name: str
    less_is_better: bool

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than another; any is than None. One that is not a number is better than none."""
        if than is None:
            return value == value
        return value < than if self.less_is_better else value > than


def parse_eval_data(values: Sequence[str]) -> dict[str, str]:
    """``["chat=data/chat", "code=data/code"]`` as name -> prefix.

    Raises:
        ConfigError: not of this form, or a name is given twice or is none that a file can have.
    """
    sets: dict[str, str] = {}
    for value in values:
        name, equals, prefix = value.partition("=")
        if not (equals and prefix and _NAME.fullmatch(name)) or name == _TAKEN:
            raise ConfigError(
                f"--eval-data {value}: expected NAME=PREFIX, the name of letters, digits, _ and -, and not {_TAKEN}, as in "
                "chat=data/chat"
            )
        if name in sets:
            raise ConfigError(f"--eval-data {value}: there is another set of that name, {name}={sets[name]}")
        sets[name] = prefix
    return sets


def parse_metric(text: str, flag: str = "--keep-best") -> Metric:
    """``rewards/accuracies``, ``NAME:rewards/accuracies``, either with a minus before it where less is better.

    Raises:
        ConfigError: it names no metric.
    """
    less, rest = text.startswith("-"), text.removeprefix("-")
    held_out, colon, name = rest.rpartition(":")
    if not name or (colon and not _NAME.fullmatch(held_out)):
        raise ConfigError(f"{flag} {text}: expected a metric of evaluations, such as rewards/accuracies or NAME:nll/chosen")
    return Metric(text, held_out, name, less or name.split("/")[-1] == "loss" or name.startswith("nll/"))


def parse_early_stop(text: str) -> tuple[Metric, int]:
    """``METRIC:PATIENCE`` as the metric and the number of evaluations.

    Raises:
        ConfigError: not of this form, or a patience below 1.
    """
    metric, colon, patience = text.rpartition(":")
    if not colon or not patience.isdigit() or int(patience) < 1:
        raise ConfigError(
            f"--early-stop {text}: expected METRIC:PATIENCE, a metric of evaluations and a number of them, 1 or more, as in "
            "rewards/accuracies:3"
        )
    return parse_metric(metric, "--early-stop"), int(patience)
