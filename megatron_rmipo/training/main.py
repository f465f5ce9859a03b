"""The trainer's entry point: configuration in, trained model out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_rmipo.checkpoint.adapter_source import with_adapter_said
from megatron_rmipo.checkpoint.facts import told_facts
from megatron_rmipo.checkpoint.makers import maker_of
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.settle import settle_source
from megatron_rmipo.checkpoint.source import Look, adapter_record, checkpoint_to_go_on_from, find_model, look_for_model
from megatron_rmipo.command import DONE, STOPPED
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.order_names import pair_order
from megatron_rmipo.data.batches.seen import SeenPairs
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.health.heartbeat import Heartbeat, forget_heartbeats
from megatron_rmipo.health.link_report import check_links
from megatron_rmipo.health.pace import Pace
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.lora.switch import AdapterView
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.trackers.opening import tracker_packages
from megatron_rmipo.runtime.agreement import on_each_rank_alone, on_first_rank
from megatron_rmipo.runtime.environment import check_environment, launched_at
from megatron_rmipo.runtime.first_failure import tell_failure
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.runtime.messages import tell_stop, warn
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.runtime.signals import RunStopped, StopRequest
from megatron_rmipo.scoring.reference import attach_scores, identify_reference, load_reference
from megatron_rmipo.training.course.prompts import Prompts
from megatron_rmipo.training.course.run import HeldOutBatches, Run
from megatron_rmipo.training.course.samples import find_prompts
from megatron_rmipo.training.course.selection import Selection
from megatron_rmipo.training.dry_run import dry_run
from megatron_rmipo.training.facts import run_facts
from megatron_rmipo.training.loop import train
from megatron_rmipo.training.observers import (
    build_profiler,
    build_throughput,
    open_reporter,
    say_what_runs,
    stage_clock,
)
from megatron_rmipo.training.outputs import (
    RunCheckpoints,
    beside_weights,
    card_of_run,
    check_outputs,
    own_save_directory,
    save_hf,
    save_trained_adapter,
    where_it_stands,
)
from megatron_rmipo.training.plan import RunPlan, plan_run
from megatron_rmipo.training.resume import after_restarts
from megatron_rmipo.training.run_report import keep_end, keep_facts, keep_tokens, tell_report
from megatron_rmipo.training.setup import TrainingState, load_training_state


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say. Returns the exit code: 0 done, 1 a fault the user can mend, 75 stopped before the end."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shows_tracebacks = "--debug" in arguments
    try:
        with Rendezvous() as rendezvous:
            config = parse_arguments(arguments)
            shows_tracebacks = config.logging.debug
            if config.planning.dry_run:
                return dry_run(config, rendezvous)
            run_training(config, rendezvous)
    except (RmipoError, RuntimeError) as error:
        return tell_failure(error, debug=shows_tracebacks)
    except RunStopped as stopped:
        shutdown_runtime()
        tell_stop(str(stopped))
        return STOPPED
    return DONE


def run_training(config: Config, rendezvous: Rendezvous) -> None:
    """One run. Called by every rank; everything a user can get wrong is checked before the model is built.

    Args:
        config: the run's configuration.
        rendezvous: where the ranks meet; whatever they decide before that, each by itself, is compared there.

    Raises:
        RmipoError: a fault the user can mend.
        RunStopped: a signal or ``--exit-interval`` ended it before it was complete.
    """
    rendezvous.timeout_minutes = config.parallel.distributed_timeout_minutes
    rendezvous.compare(told_facts(config.to_flat_dict(), rendezvous.launch.local_rank))
    config = with_adapter_said(config)
    check_environment(tracker_packages(config.logging))
    look = rendezvous.look_once
    config = after_restarts(config, rendezvous.launch.restarts, launched_at(), look=look)
    found = look_for_model("the model to start from", partial(find_model, config), look, maker=maker_of(config))
    plan = plan_run(config, found, rendezvous.launch.world_size, look=look)
    look("the output directories", partial(check_outputs, config, plan.source))
    rendezvous.compare(look("what the ranks must agree on", partial(run_facts, plan)))

    groups = initialize_runtime(**config.parallel.runtime_arguments(), seed=config.training.seed, rendezvous=rendezvous)
    owner = own_save_directory(config, groups)
    if config.parallel.check_links:
        check_links(groups, config.log_directory, partial(print, flush=True), warn)
    on_first_rank(groups.world, partial(forget_heartbeats, config.log_directory))
    with Heartbeat(config.log_directory, rendezvous.launch) as heartbeat:
        _train_by_plan(config, plan, groups, owner, heartbeat, look)
    if owner is not None:
        owner.release()
    shutdown_runtime()


def _train_by_plan(
    config: Config, plan: RunPlan, groups: ProcessGroups, owner: DirectoryOwner | None, heartbeat: Heartbeat, look: Look
) -> None:
    """What connected ranks do: settle what they start from, load it, train, export."""
    verify = not config.checkpoint.no_verify_checkpoint
    source = settle_source(partial(find_model, config), groups, verify=verify, owner=owner, maker=maker_of(config))
    # Anew, for it may be another checkpoint than this rank had found, or another run may have saved meanwhile.
    plan = on_each_rank_alone(groups.world, partial(plan_run, config, source, groups.world_size, plan.data, look=look))
    on_first_rank(groups.world, partial(check_outputs, config, source))
    plan = _with_reference_settled(plan, groups, verify=verify)
    memory = MemoryReport(
        config,
        source.arch,
        groups,
        config.log_directory,
        partial(plan.data.largest_pair, plan.layout(dp_rank=0, dp_size=1)),
        latest_checkpoint=partial(checkpoint_to_go_on_from, config.checkpoint),
    )
    stop = StopRequest(groups)
    prompts = find_prompts(config, source, plan.data.chat.form, groups)
    adapter = adapter_record(source, groups)
    state = _load(plan, groups, memory, stop, None if adapter is None else adapter["base_fingerprint"])
    with open_reporter(config, groups, plan.train_iters, plan.start.progress) as reporter:
        run = _assemble(plan, groups, state, reporter, memory, stop, owner, heartbeat, prompts, adapter)
        say_what_runs(run, source, plan.start, plan.data.context)
        keep_facts(run, source)
        for note in plan.data.chat.notes:
            reporter.warn(note)
        if not train(run):
            raise RunStopped(on_first_rank(groups.world, partial(where_it_stands, config, run.progress)))
        keep_end(run)
        # Of the weights that the last evaluation saw.
        keep_tokens(run)
        _export(run, plan)
    tell_report(config, groups)


def _export(run: Run, plan: RunPlan) -> None:
    """The trained model and adapter, or those of the best evaluation, where ``--save-hf`` and ``--save-adapter`` name a place."""
    run.heartbeat.doing("export")
    step = run.progress.step
    if run.config.checkpoint.save_hf_from == "best":
        step = run.checkpoints.load_best()
        run.reporter.say(f"the export is from step {step}, the best by {run.config.evaluation.keep_best}")
    adapter_card = partial(card_of_run, plan, run.groups, step, of_adapter=True)
    save_trained_adapter(run.config, plan.source, run.state, run.groups, adapter_card)
    save_hf(
        run.config, plan.source, run.state, run.progress, run.groups, run.stop, partial(beside_weights, plan, run.groups, step)
    )


def _with_reference_settled(plan: RunPlan, groups: ProcessGroups, *, verify: bool) -> RunPlan:
    """The plan with the one reference that all ranks take, where it is another model than the run starts from."""
    reference = plan.reference
    if reference is None or reference.source is None or reference.within or reference.source.directory == plan.source.directory:
        return plan
    found = reference.source
    settled = settle_source(lambda: found, groups, verify=verify, maker=found.maker)
    return dataclasses.replace(plan, reference=dataclasses.replace(reference, source=settled))


def _load(plan: RunPlan, groups: ProcessGroups, memory: MemoryReport, stop: StopRequest, base: str | None) -> TrainingState:
    """The state that the run starts from, and the reference's log-probs: another model's before, while there is room for it."""
    is_within = plan.reference is not None and plan.reference.within
    if not is_within:
        _attach_reference_scores(plan, groups, memory, stop)
    with memory.explaining("loading the model"):
        state = _load_state(plan, groups)
    if is_within:
        _attach_reference_scores(plan, groups, memory, stop, state.policy, base)
    return state


def _attach_reference_scores(
    plan: RunPlan,
    groups: ProcessGroups,
    memory: MemoryReport,
    stop: StopRequest,
    policy: Policy | None = None,
    base: str | None = None,
) -> None:
    if plan.reference is None:
        return
    data, progress = plan.data, plan.start.progress
    fingerprint = progress.reference = identify_reference(plan.reference, groups, base)
    seen = [SeenPairs.in_order(data.train, _order(plan), progress.consumed_pairs, plan.total_pairs)]
    seen += [SeenPairs.first(one.pairs, one.num_pairs) for one in data.held_out_sets]
    with memory.explaining("loading the reference", trains=False):
        attach_scores(plan.config, plan.reference, fingerprint, seen, plan.objective.needs, groups, memory, stop, policy)


def _order(plan: RunPlan) -> PairOrder:
    return pair_order(plan.start.progress.order, len(plan.data.train), plan.config.training.seed)


def _load_state(plan: RunPlan, groups: ProcessGroups) -> TrainingState:
    state = load_training_state(plan.config, plan.source, plan.start.objective_state, groups, train_iters=plan.train_iters)
    if plan.objective.needs.perturbation is None:
        return state
    assert plan.reference is not None
    if plan.reference.within:
        state.reference = AdapterView(state.model, plan.reference.active)
    else:
        state.reference = load_reference(plan.config, plan.reference, plan.start.progress.reference, groups)
    return state


def _assemble(
    plan: RunPlan,
    groups: ProcessGroups,
    state: TrainingState,
    reporter: Reporter,
    memory: MemoryReport,
    stop: StopRequest,
    owner: DirectoryOwner | None,
    heartbeat: Heartbeat,
    prompts: Prompts | None,
    adapter: dict[str, Any] | None,
) -> Run:
    config, data, progress = plan.config, plan.data, plan.start.progress
    layout = plan.layout(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    return Run(
        config=config,
        groups=groups,
        state=state,
        objective=plan.objective,
        progress=progress,
        pairs=BatchBuilder(data.train, layout),
        order=_order(plan),
        train_iters=plan.train_iters,
        total_pairs=plan.total_pairs,
        held_out_sets=[HeldOutBatches(one.name, BatchBuilder(one.pairs, layout), one.num_pairs) for one in data.held_out_sets],
        selection=Selection(config.evaluation, progress),
        reporter=reporter,
        throughput=build_throughput(config, groups),
        profiler=build_profiler(config, groups, progress, reporter),
        memory=memory,
        checkpoints=RunCheckpoints(
            config, plan.source, state, progress, groups, owner, partial(beside_weights, plan, groups), adapter
        ),
        stop=stop,
        clock=stage_clock(state.policy),
        pace=Pace(groups),
        heartbeat=heartbeat,
        assets=plan.source.assets,
        prompts=prompts,
    )
