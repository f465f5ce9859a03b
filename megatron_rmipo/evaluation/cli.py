"""Command line of ``tools/evaluate_pairs.py``: how often a model's log-probs prefer the better of two answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import DONE, STOPPED
from megatron_rmipo.config.options import described, option
from megatron_rmipo.config.schema import ModelConfig
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.config.values import field_types
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.evaluation.comparing import Comparison, compare
from megatron_rmipo.evaluation.criteria import CRITERIA, Wanted, choose_criteria
from megatron_rmipo.evaluation.results import Bootstrap, benchmark_figures, pair_lines, table_text, tables_of
from megatron_rmipo.evaluation.run import Evaluated, EvaluationPlan, evaluate
from megatron_rmipo.evaluation.sets import SetSource
from megatron_rmipo.evaluation_file import Evaluation, EvaluationTable, write_evaluation, write_whole
from megatron_rmipo.objectives.arguments import parse_fields_and_objective
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.runtime.first_failure import tell_failure
from megatron_rmipo.runtime.groups import shutdown_runtime
from megatron_rmipo.runtime.messages import tell_stop
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.runtime.signals import RunStopped
from megatron_rmipo.scoring.model_flags import MODEL_FLAGS, config_of

_DESCRIPTION = (
    "How often a checkpoint's log-probs prefer the better of two answers, on prepared and raw preference sets, at any parallel "
    "layout: accuracy by subset with intervals, margins, calibration, length bias. Reads RewardBench, RewardBench 2, RM-Bench, "
    "LLMBar, PandaLM and every layout of the data tool. Start several ranks with torchrun."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate, and by what."""

    data: list[str] = dataclasses.field(
        default_factory=list,
        metadata=described(
            "The sets: NAME=PREFIX of prepared data, NAME=FILE, DIR or hub name; #SPLIT behind it names a split or a part, as "
            "--split of preprocess_preferences.py does.",
            "NAME=SOURCE",
        ),
    )
    by: list[str] | None = dataclasses.field(
        default=None,
        metadata=described(
            f"What answers are ranked by: {', '.join(CRITERIA)}; unset: all that the given models allow.", "CRITERION"
        ),
    )
    objective: str | None = option(
        None, "Objective whose rewards are ranked by, with its options, as in training: {objectives}, or one of your own.", "NAME"
    )
    chat_template: str | None = option(
        None, "Chat template of raw sets, as of preprocess_preferences.py; unset: the model's own."
    )
    seq_length: int | None = option(
        None,
        "Most tokens of a prompt with one of its answers; raw rows that are longer are left out, and counted; unset: what "
        "the model takes.",
    )
    subset_column: str | None = option(
        None, "Column of raw rows that names their subset; unset: subset, domain, category or kind."
    )
    cache: str | None = option(
        None,
        "Directory where log-probs are kept, to be found again; unset: beside prepared data; of raw sets they are not kept.",
        "DIR",
    )
    output: str | None = option(None, "Write tables and figures to this file, as JSON.", "FILE")
    pairs: str | None = option(None, "Write a line for each pair, with all of its scores, to this file, as JSON.", "FILE")
    compare: str | None = option(
        None, "Compare with the --pairs of another evaluation: agreement, and who is right where.", "FILE"
    )
    bootstrap_samples: int = option(1000, "Samples of the bootstrap that the intervals are from.")
    bootstrap_seed: int = option(1234, "Seed of these samples.")


_FIELDS: dict[type, Sequence[str]] = {
    EvaluationConfig: [field.name for field in dataclasses.fields(EvaluationConfig)],
    **MODEL_FLAGS,
    ModelConfig: (*MODEL_FLAGS[ModelConfig], "reference_hf", "reference_load"),
}


def plan_of(flags: EvaluationConfig, model: ModelConfig, objective: Objective | None) -> EvaluationPlan:
    """What the flags ask for.

    Raises:
        ConfigError: there is nothing to evaluate, or a flag that does nothing or cannot be.
    """
    if not flags.data:
        raise ConfigError("nothing to evaluate: give --data NAME=PREFIX of prepared data, or NAME=FILE, DIR or hub name.")
    sources = [SetSource.parse(text) for text in flags.data]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--data {twice}=...: two sets have that name. Give each its own.")
    if flags.bootstrap_samples < 1 or flags.bootstrap_seed < 0:
        raise ConfigError("--bootstrap-samples must be at least 1, and --bootstrap-seed at least 0.")
    if flags.seq_length is not None and flags.seq_length < 3:
        raise ConfigError(f"--seq-length {flags.seq_length}: a pair needs at least 3 tokens.")
    for name in ("chat_template", "seq_length", "subset_column") if all(source.is_prepared for source in sources) else ():
        if (value := getattr(flags, name)) is not None:
            raise ConfigError(f"{flag_of(name)} {value} does nothing: every set of --data is prepared. Leave it out.")
    has_reference = model.reference_hf is not None or model.reference_load is not None
    if model.reference_hf is not None and model.reference_load is not None:
        raise ConfigError("--reference-hf and --reference-load both name the reference. Leave one out.")
    criteria = choose_criteria(flags.by, objective, has_reference=has_reference)
    return EvaluationPlan(
        sources, Wanted(criteria, objective), flags.chat_template, flags.seq_length, flags.subset_column, flags.cache
    )


def report(evaluated: Evaluated, flags: EvaluationConfig, objective: Objective | None) -> str:
    """Write the files that are asked for; what to show.

    Raises:
        RmipoError: a file cannot be read or written.
    """
    bootstrap = Bootstrap(flags.bootstrap_samples, flags.bootstrap_seed)
    tables = [table for one in evaluated.results for table in tables_of(one, bootstrap)]
    comparison = compare(evaluated.results, Path(flags.compare), bootstrap) if flags.compare is not None else None
    if comparison is not None:
        tables.append(comparison.table)
    if flags.pairs is not None:
        lines = [json.dumps(line) for one in evaluated.results for line in pair_lines(one)]
        write_whole(Path(flags.pairs), "\n".join(lines) + "\n")
    if flags.output is not None:
        write_evaluation(Path(flags.output), _evaluation_of(evaluated, flags, objective, tables, comparison))
    shown = [table_text(table) for table in tables if not table.is_detail]
    return "\n\n".join([f"model {evaluated.model}", *shown])


def _evaluation_of(
    evaluated: Evaluated,
    flags: EvaluationConfig,
    objective: Objective | None,
    tables: Sequence[EvaluationTable],
    comparison: Comparison | None,
) -> Evaluation:
    sets = {
        one.asked.name: {
            "source": one.asked.source,
            "rows": one.asked.num_rows,
            "questions": len(one.asked.questions),
            "pairs": len(one.lengths),
            "left_out": one.asked.left_out,
            "examples": one.asked.examples,
            "benchmark": benchmark_figures(one),
        }
        for one in evaluated.results
    }
    details = {
        "reference": evaluated.reference or None,
        "objective": None if objective is None else {"name": objective.name, **_options_of(objective)},
        "criteria": {name: CRITERIA[name] for name in evaluated.results[0].scores},
        "bootstrap": {"samples": flags.bootstrap_samples, "seed": flags.bootstrap_seed},
        "sets": sets,
        "compared": None
        if comparison is None
        else {name: {by: one.as_dict() for by, one in its.items()} for name, its in comparison.agreements.items()},
    }
    return Evaluation("evaluate_pairs", "Preference pairs, without a judge", evaluated.model, tables, details)


def _options_of(objective: Objective | None) -> dict[str, Any]:
    return {} if objective is None else {key: getattr(objective.config, key) for key in field_types(objective.Config)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool on this rank; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with Rendezvous() as rendezvous:
            sections, objective = parse_fields_and_objective(arguments, _FIELDS, "evaluate_pairs.py", _DESCRIPTION)
            flags = sections[EvaluationConfig]
            config = config_of(sections)
            told = config.to_flat_dict() | dataclasses.asdict(flags) | _options_of(objective)
            evaluated = evaluate(config, plan_of(flags, config.model, objective), told, rendezvous)
            text = None if evaluated is None else report(evaluated, flags, objective)
    except (RmipoError, RuntimeError) as error:
        return tell_failure(error, debug="--debug" in arguments)
    except RunStopped as stopped:
        shutdown_runtime()
        tell_stop(str(stopped))
        return STOPPED
    if text is not None:
        print(text)
    return DONE
