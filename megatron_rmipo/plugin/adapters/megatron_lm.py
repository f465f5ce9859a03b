"""Megatron-LM's ``pretrain`` on preference pairs: its arguments, checkpoints, logging and evaluation, our loss.

Written against ``megatron.training`` of megatron-core 0.19.2.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch import Tensor
from torch.nn import Module

from megatron_rmipo.data.batches.order_names import NEW_ORDER, UNNAMED_ORDER, OrderName
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.adopt import attach_model
from megatron_rmipo.objectives.arguments import add_objective_arguments, objective_of_arguments
from megatron_rmipo.plugin.adapters.held_out import HeldOutBatches, pairs_of_evaluation
from megatron_rmipo.plugin.adapters.megatron_lm_data import attach_reference_scores, context_token_of, open_named_pairs
from megatron_rmipo.plugin.adapters.megatron_lm_problems import refuse_arguments
from megatron_rmipo.plugin.batches import Microbatch, PreferenceBatches, preference_batches
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.runtime.groups import ProcessGroups

_Models = TypeVar("_Models", Module, list[Module])


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the objective's flags; what Megatron-LM's ``extra_args_provider`` is.

    Some of Megatron-LM's own flags get another default: dropout 0, ``--calculate-per-token-loss``,
    ``--dataloader-type external``, ``--eval-iters 0``, ``--eval-interval 1000``.

    Raises:
        ConfigError: there is no such objective.
    """
    add_objective_arguments(parser, sys.argv[1:])
    group = parser.add_argument_group("Preference pairs")
    group.add_argument(
        "--pass-before-schedule",
        action="store_true",
        help="Compute what a loss needs beside its pairs' own log-probs in passes of their own before each schedule, by wrapping "
        "Megatron-LM's train_step and get_forward_backward_func; unset: responses alone, log p(y), stand in the rows.",
    )
    group.add_argument(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Compute a prompt once for both of its responses; off: once for each.",
    )
    group.add_argument(
        "--tokens-per-microbatch",
        type=int,
        metavar="INT",
        help="Most tokens of one packed row; unset: as many as --micro-batch-size pairs on average have.",
    )
    group.add_argument(
        "--logprob-chunk-size", type=int, default=4096, metavar="INT", help="Vocabulary entries whose logits exist at one time."
    )
    group.add_argument(
        "--pair-order",
        choices=get_args(OrderName),
        help="The order of pairs; unset: keyed in a new run, and in one that goes on the one that its checkpoint names, or "
        "permuted, where a version that had no other wrote it.",
    )
    parser.set_defaults(
        calculate_per_token_loss=True,
        dataloader_type="external",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        eval_iters=0,
        eval_interval=1000,
    )
    return parser


class PreferenceTraining:
    """What a script hands to Megatron-LM's ``pretrain``: the data sets' provider, the forward step, and a hook for its model.

    A pair counts as a sample: ``--global-batch-size`` pairs a step, in rows of ``--micro-batch-size`` pairs on average.

    Args:
        args: as ``parse_and_validate_args`` gave them, before a model's configuration is made of them.

    Attributes:
        objective: what is trained.

    Raises:
        ConfigError: arguments that do not go together with preference pairs, each by name.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.objective = objective_of_arguments(vars(args))
        refuse_arguments(args, self.objective)
        if args.pipeline_model_parallel_size > 1:
            # Rows differ in length. Megatron refuses this beside its default dispatcher, which a dense model has no use for.
            args.variable_seq_lengths = True
            if args.num_experts is None:
                args.moe_token_dispatcher_type = "alltoall"
        self._model: Module | None = None
        self._step: PreferenceStep | None = None
        if args.pass_before_schedule:
            self._wrap_loop()

    @property
    def vocab_size(self) -> int:
        """Real vocabulary: ``--vocab-size``, else that of the tokenizer. What a padded one has beyond is in no softmax."""
        if self.args.vocab_size is not None:
            return int(self.args.vocab_size)
        return int(importlib.import_module("megatron.training").get_tokenizer().vocab_size)

    def attach(self, models: _Models) -> _Models:
        """Let the model take packed rows: a hook of its configuration, or called on what a model provider has built.

        Args:
            models: this rank's model, or a list of it alone.

        Returns:
            The same.

        Raises:
            ConfigError: what of it cannot be scored exactly, by name.
        """
        (self._model,) = models if isinstance(models, list) else [models]
        attach_model(self._model, vocab_size=self.vocab_size, chunk_size=self.args.logprob_chunk_size)
        return models

    def datasets(
        self, num_samples: Sequence[int | None], vp_stage: int | None = None
    ) -> tuple[PreferenceBatches | None, HeldOutBatches | None, None]:
        """Micro-batches for training and for evaluation; Megatron-LM's data sets' provider. All ranks call it together.

        Training goes on at ``args.consumed_train_samples``.

        Args:
            num_samples: pairs of the run for training, evaluation and test.
            vp_stage: None, see :meth:`__init__`.

        Raises:
            ConfigError: the model is not attached, too few held-out pairs, or the reference's log-probs are gone.
            DataError: what the data has not.
        """
        if self._model is None:
            raise ConfigError(
                "no model was attached: append PreferenceTraining.attach to model_config.post_wrap_hooks, or call it on what the "
                "model provider has built. pretrain asks a provider only where pretrain_cfg_container_from_args is given "
                "no model_config."
            )
        groups = ProcessGroups.of_megatron()
        needs, args, vocab_size = self.objective.needs, self.args, self.vocab_size
        # Megatron-LM takes --data-path only where there is no --valid-data-path.
        flag = "--data-path" if args.data_path else "--train-data-path"
        train = open_named_pairs(args, flag, args.data_path or args.train_data_path, needs, vocab_size)
        valid = None
        if args.valid_data_path:
            valid = open_named_pairs(args, "--valid-data-path", args.valid_data_path, needs, vocab_size)
        collections = [pairs for pairs in (train, valid) if pairs is not None]
        attach_reference_scores(self._model, collections, needs, args, groups)
        self._step = PreferenceStep(self.objective, groups=groups)
        saved = self._saved_args() if args.iteration > 0 else None
        # Among the arguments they go into checkpoints.
        args.pair_order = self._order(saved)
        if self.objective.initial_state():
            self._recall_state(saved)
        batches = functools.partial(self._batches, context_token_id=context_token_of(args, collections), groups=groups)
        _say(f"objective: {args.objective}; {len(train)} pairs, {args.global_batch_size} a step", groups)
        held_out = None
        if valid is not None:
            size, mean = args.eval_global_batch_size, args.eval_micro_batch_size
            named = ("--eval-iters", "--eval-global-batch-size", f"--valid-data-path {' '.join(args.valid_data_path)}")
            total_pairs = pairs_of_evaluation(valid, args.eval_iters, size, named=named)
            held_out = HeldOutBatches(functools.partial(batches, valid, size=size, mean=mean, total_pairs=total_pairs))
        if args.skip_train:
            return None, held_out, None
        training = batches(
            train,
            size=args.global_batch_size,
            mean=args.micro_batch_size,
            total_pairs=num_samples[0],
            consumed_pairs=args.consumed_train_samples,
            num_workers=args.num_workers,
        )
        return training, held_out, None

    # Every rank builds its own; else Megatron-LM asks the first tensor-parallel rank alone.
    datasets.is_distributed = True  # type: ignore[attr-defined]

    def forward_step(
        self, data_iterator: Iterator[Microbatch], model: Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Any]:
        """What Megatron-LM calls for each micro-batch."""
        assert self._step is not None, "pretrain asks for the data before it trains"
        return self._step(data_iterator, model, return_schedule_plan)

    def _batches(
        self, pairs: PairCollection, *, size: int, mean: int, groups: ProcessGroups, **further: Any
    ) -> PreferenceBatches:
        args = self.args
        return preference_batches(
            pairs,
            self.objective,
            global_batch_size=size,
            num_microbatches=size // (mean * groups.dp_size),
            tokens_per_microbatch=args.tokens_per_microbatch,
            seed=args.seed,
            order=args.pair_order,
            unconditional="pass" if args.pass_before_schedule else "rows",
            share_prompts=args.share_prompts,
            multiple_of=args.tensor_model_parallel_size if args.sequence_parallel else 1,
            groups=groups,
            **further,
        )

    def _saved_args(self) -> Any:
        """The arguments in the checkpoint that the run goes on from; None in formats that are not torch_dist."""
        from megatron.core import dist_checkpointing

        folder = str(Path(self.args.load) / f"iter_{self.args.iteration:07d}")
        if not dist_checkpointing.check_is_distributed_checkpoint(folder):
            return None
        return dist_checkpointing.load_common_state_dict(folder)["args"]

    def _order(self, saved: Any) -> str:
        """The order of pairs that the run has had, or gets."""
        args = self.args
        if args.pair_order is not None or args.iteration == 0:
            return args.pair_order or NEW_ORDER
        if saved is None:
            raise ConfigError(
                f"--load {args.load}: iteration {args.iteration} does not tell in which order the run sees its pairs. Say so: "
                f"--pair-order {NEW_ORDER}, or {UNNAMED_ORDER} where it was begun by a version without that flag."
            )
        return getattr(saved, "pair_order", None) or UNNAMED_ORDER

    def _recall_state(self, saved: Any) -> None:
        """What the objective carried when the checkpoint that the run goes on from was written."""
        assert self._step is not None
        args = self.args
        if args.iteration > 0:
            if getattr(saved, "objective", None) != args.objective or not hasattr(saved, "objective_state"):
                raise ConfigError(
                    f"--load {args.load}: iteration {args.iteration} holds nothing that --objective {args.objective} carries "
                    "from step to step. Go on with the objective that the run was begun with, or begin anew with --finetune."
                )
            self._step.state = dict(saved.objective_state)
        args.objective_state = dict(self._step.state)

    def _wrap_loop(self) -> None:
        """Megatron-LM has no hook before a schedule, nor behind a step; it looks both functions up when it needs them."""
        loop: Any = importlib.import_module("megatron.training.training")
        find_schedule, train_step = loop.get_forward_backward_func, loop.train_step

        @functools.wraps(find_schedule)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            return functools.partial(self._run_schedule, find_schedule(*args, **kwargs))

        @functools.wraps(train_step)
        def take_step(*args: Any, **kwargs: Any) -> Any:
            found = train_step(*args, **kwargs)
            skipped = bool(found[1])
            assert self._step is not None
            if self._step.state:
                self._step.after_step(updated=not skipped)
                # Among the arguments it goes into checkpoints.
                self.args.objective_state = dict(self._step.state)
            return found

        loop.get_forward_backward_func, loop.train_step = get_forward_backward_func, take_step

    def _run_schedule(self, schedule: Callable[..., Any], *, data_iterator: Any, num_microbatches: int, **kwargs: Any) -> Any:
        assert self._step is not None
        microbatches = [next(data_iterator) for _ in range(num_microbatches)]
        self._step.before_step(kwargs["model"][0], microbatches[0].batch)
        return schedule(data_iterator=iter(microbatches), num_microbatches=num_microbatches, **kwargs)


def _say(text: str, groups: ProcessGroups) -> None:
    if groups.rank == 0:
        print(f"> {text}", flush=True)
