"""What of Megatron-LM's arguments does not go together with preference pairs: a line each, with what would work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective

# What Megatron-LM's parser puts where --data-path is given and --split is not.
_NO_SPLIT = (None, "969, 30, 1")
_OTHER_DATA = ("test_data_path", "data_args_path", "per_split_data_args_path", "mock_data", "sft")
_OTHER_LAYOUTS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "hybrid_context_parallel")
_OTHER_STEPS = ("step_batch_size_schedule", "rampup_batch_size", "decrease_batch_size_if_needed", "phase_transition_iterations")


def refuse_arguments(args: Any, objective: Objective) -> None:
    """Refuse what cannot work, all of it at once.

    Args:
        args: as Megatron-LM's ``parse_and_validate_args`` left them.
        objective: what is trained.

    Raises:
        ConfigError: a line for each flag.
    """
    problems = [*_loop_problems(args), *_data_problems(args), *_evaluation_problems(args), *_objective_problems(args, objective)]
    if problems:
        raise ConfigError("these arguments do not go together with preference pairs:\n" + "\n".join(f"  - {p}" for p in problems))


def _loop_problems(args: Any) -> Iterator[str]:
    if not args.calculate_per_token_loss:
        yield (
            "--calculate-per-token-loss is missing: the loss would be a mean of means, which depends on how the batch is cut; "
            "add_arguments switches it on"
        )
    if args.dataloader_type != "external":
        yield f"--dataloader-type {args.dataloader_type}: pairs come from a loader of their own; external, or leave it out"
    for name in ("hidden_dropout", "attention_dropout"):
        if value := getattr(args, name):
            yield (
                f"{flag_of(name)} {value}: dropout would make the loss depend on how the batch is cut; 0 (where "
                f"--use-checkpoint-args took it from a checkpoint, set args.{name} = 0.0 in the script)"
            )
    if args.virtual_pipeline_model_parallel_size is not None:
        yield "--num-layers-per-virtual-pipeline-stage, or virtual stages otherwise: one stage a rank is built; leave it out"
    if args.context_parallel_size > 1:
        yield f"--context-parallel-size {args.context_parallel_size}: rows stay whole on a rank; 1 (our own trainer shares them)"
    if args.mtp_num_layers:
        yield f"--mtp-num-layers {args.mtp_num_layers}: multi-token prediction has a loss of its own, not built; leave it out"
    if args.overlap_moe_expert_parallel_comm:
        yield "--overlap-moe-expert-parallel-comm wants a schedule plan, which packed rows have none of; leave it out"
    if args.num_experts is not None and args.moe_token_dispatcher_type == "allgather":
        yield (
            "--moe-token-dispatcher-type allgather, Megatron-LM's default: ranks would have to hold equally many tokens, and "
            "rows differ in length; alltoall"
        )
    for name in _OTHER_STEPS:
        if getattr(args, name, None):
            yield f"{flag_of(name)}: the batch is as large at every step; give --global-batch-size"
    for name in _OTHER_LAYOUTS:
        if getattr(args, name, False):
            yield f"{flag_of(name)} does nothing here: pairs are packed with positions and attention of their own; leave it out"


def _data_problems(args: Any) -> Iterator[str]:
    if not (args.data_path or args.train_data_path):
        yield "--train-data-path is missing: the PREFIX of pairs prepared with tools/preprocess_preferences.py"
    for name in _OTHER_DATA:
        if getattr(args, name, None):
            yield f"{flag_of(name)}: pairs are those of --train-data-path, held-out ones those of --valid-data-path; leave it out"
    if args.split not in _NO_SPLIT:
        yield f"--split {args.split}: held-out pairs are those of --valid-data-path; leave it out"


def _evaluation_problems(args: Any) -> Iterator[str]:
    if args.multiple_validation_sets:
        yield "--multiple-validation-sets: name one set, or a blend, with --valid-data-path"
    if args.full_validation:
        yield "--full-validation ends Megatron-LM with a TypeError where there is one set (0.19.2); give --eval-iters"
    if args.valid_data_path and not args.eval_iters:
        yield f"--valid-data-path does nothing: give --eval-iters N for N x {args.eval_global_batch_size} pairs an evaluation"
    if args.eval_iters and not args.valid_data_path:
        yield (f"--eval-iters {args.eval_iters}: there are no held-out pairs; name them with --valid-data-path, or leave it out")


def _objective_problems(args: Any, objective: Objective) -> Iterator[str]:
    needs = objective.needs
    name = f"--objective {args.objective}"
    if needs.perturbation is not None:
        yield f"{name} keeps its reference in memory, which this adapter holds none of; another objective, or our own trainer"
    if args.pass_before_schedule:
        return
    if objective.initial_state():
        yield f"{name} carries numbers from step to step, kept only with --pass-before-schedule; give it"
    elif args.pipeline_model_parallel_size > 1 and (needs.batch or needs.mismatched):
        yield f"{name} reads log-probs of the whole batch, on several pipeline stages only with --pass-before-schedule; give it"
