"""What a run leaves for its report, and the report itself."""

from __future__ import annotations

import datetime
import shlex
import socket
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.tensors import active_parameters, num_parameters
from megatron_rmipo.passes.token_logps import Place, TokenLogps, token_layout, token_logps
from megatron_rmipo.reports.page.run_facts import add_facts, commit_of_package, data_facts, launcher_words, write_facts
from megatron_rmipo.reports.page.token_record import choose_pairs, write_tokens
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.environment import numeric_environment
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.messages import warn
from megatron_rmipo.torchrun import read_launch
from megatron_rmipo.training.course.run import HeldOutBatches, Run
from megatron_rmipo.training.observers import describe_layout, describe_precision

_VERSION = "version of "


def keep_facts(run: Run, source: ModelSource) -> None:
    """Write ``run.json`` on the first rank. All ranks call it together.

    Raises:
        CheckpointError: on every rank: it cannot be written.
    """
    on_first_rank(run.groups.world, partial(_keep_facts, run, source))


def _keep_facts(run: Run, source: ModelSource) -> None:
    launch, now = read_launch(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = numeric_environment(launch.local_rank)
    held_out = {one.name: {**data_facts(one.batches.pairs), "evaluated": one.num_pairs} for one in run.held_out_sets}
    facts: dict[str, Any] = {
        "versions": {name.removeprefix(_VERSION): value for name, value in environment.items() if name.startswith(_VERSION)},
        "commit": commit_of_package(),
        "host": socket.gethostname(),
        "device": environment["device"],
        "ranks": run.groups.world_size,
        "model": _model(source),
        "tokenizer": str(source.assets),
        "layout": describe_layout(run.groups, run.config.parallel),
        "precision": describe_precision(run.config.model, run.config.memory),
        "train_iters": run.train_iters,
        "total_pairs": run.total_pairs,
        "data": {"train": data_facts(run.pairs.pairs), "held_out": held_out.pop("", None), "eval_data": held_out},
    }
    command = shlex.join([*launcher_words(launch), *sys.argv[1:]])
    write_facts(run.config.log_directory, facts, {"time": now, "step": run.progress.step, "command": command})


def _model(source: ModelSource) -> dict[str, Any]:
    arch = source.arch
    known = {} if isinstance(arch, ForeignArchitecture) else {"active_parameters": active_parameters(arch)}
    return {"family": arch.family, "from": str(source.directory), "parameters": num_parameters(arch), **known}


def keep_end(run: Run) -> None:
    """Add to ``run.json`` why a run that is over stopped early, where it did. All ranks call it together."""
    if run.selection.stops:
        on_first_rank(run.groups.world, lambda: add_facts(run.config.log_directory, {"early_stop": run.selection.said()}))


def keep_tokens(run: Run) -> None:
    """Write ``token_logps.jsonl`` of some held-out pairs of the last evaluation. All ranks call it together.

    They are of the main set, without it of the first further one. It is a pass over a few pairs, which every replica runs,
    forward only.
    """
    if not (run.held_out_sets and run.config.logging.report):
        return
    held_out = run.held_out_sets[0]
    log_dir = run.config.log_directory
    run.heartbeat.doing("log-probs of single tokens")
    chosen = on_first_rank(run.groups.world, partial(choose_pairs, log_dir, run.progress.step, held_out.name))
    if not chosen:
        return
    builder = BatchBuilder(held_out.batches.pairs, token_layout(held_out.batches.layout))
    batch = builder.build(np.array([number for number, _ in chosen]))
    run.state.model.eval()
    with run.stop, run.memory.explaining("log-probs of single tokens", builder, batch, run.state.optimizer):
        told = token_logps(run.state.model, batch, run.groups)
    on_first_rank(run.groups.world, lambda: write_tokens(log_dir, _lines(run.progress.step, held_out, chosen, told)))


def _lines(
    step: int, held_out: HeldOutBatches, chosen: list[tuple[int, str]], told: dict[Place, TokenLogps]
) -> Iterator[dict[str, Any]]:
    for place, (number, why) in enumerate(chosen):
        pair = held_out.batches.pairs[number]
        shared = {"step": step, "set": held_out.name, "pair": number, "why": why}
        yield {**shared, "response": "prompt", "token_ids": pair.prompt.tolist()}
        for branch, response in enumerate(("chosen", "rejected")):
            tokens = told.get((place, branch))
            if tokens is not None and tokens.logps:
                ids = getattr(pair, response).tolist()
                yield {**shared, "response": response, "token_ids": ids, "logps": tokens.logps, "alone": tokens.alone}


def tell_report(config: Config, groups: ProcessGroups) -> None:
    """Write the run's report on its first rank and tell where, with the last line of the run. All ranks call it together.

    A report that cannot be written is warned of: what was trained is there.
    """
    if config.logging.report:
        on_first_rank(groups.world, partial(_tell_report, config))


def _tell_report(config: Config) -> None:
    path = config.log_directory / "report.html"
    try:
        from megatron_rmipo.reports.page.report import write_report

        write_report([config.log_directory], path)
    except Exception as error:
        warn(f"{path}: the report was not written ({type(error).__name__}: {error}). tools/report.py writes it anew.")
    else:
        print(f"report: {path}", flush=True)
