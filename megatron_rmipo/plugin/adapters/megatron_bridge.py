"""Megatron-Bridge's ``finetune`` on preference pairs: its models, recipes, LoRA, checkpoints and logging, our data and losses.

Written against Megatron-Bridge 0.6.2 (``megatron/bridge/training/{train,eval,callbacks,setup}.py``) with megatron-core 0.19.2::

    config = use_preferences(a_recipe(), PreferenceData(objective="rmipo", data_path=["data/pairs"]))
    step = PreferenceFinetune()
    finetune(config, step, callbacks=[step])
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module

from megatron_rmipo.data.batches.order_names import NEW_ORDER, OrderName
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import CheckpointError, ConfigError
from megatron_rmipo.model.adopt import attach_model
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.contract import check_state
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.held_out import HeldOutBatches, pairs_of_evaluation
from megatron_rmipo.plugin.adapters.megatron_bridge_problems import problems_of, transformer_of
from megatron_rmipo.plugin.adapters.reference_cache import attach_cached_scores, has_cached_scores
from megatron_rmipo.plugin.batches import Microbatch, PreferenceBatches, preference_batches
from megatron_rmipo.plugin.scores import score_reference
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.plugin.without_adapters import has_adapters
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.whole_files import replace_file

try:
    from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
    from megatron.bridge.training.callbacks import Callback, CallbackContext
except ImportError as error:
    raise ConfigError(
        "this adapter needs NVIDIA's Megatron-Bridge (written against 0.6.2; Python 3.12, CUDA), which cannot be imported: "
        f"{error}. pip install megatron-bridge==0.6.2, or take NVIDIA's NeMo container."
    ) from error

STATE_FILE = "preference_objective.json"


@dataclasses.dataclass(kw_only=True)
class PreferenceData(DatasetProvider):
    """``config.dataset``: prepared pairs, and the objective that is trained on them.

    A pair counts as a sample: ``train.global_batch_size`` pairs a step, in rows of ``train.micro_batch_size`` pairs on average.
    Only plain values, so that a checkpoint's ``run_config.yaml`` holds them.

    Attributes:
        objective, objective_options: as of :func:`megatron_rmipo.objectives.registry.build_objective`.
        data_path: ``PREFIX`` of prepared data, one or more.
        valid_data_path: the same, held out: the first ``validation.eval_iters`` batches are evaluated each time.
        reference_cache: where ``tools/score_pairs.py`` put log-probs of the reference; None: beside the data, or where there are
            none of a model with adapters: those of the model with them off, found out before training.
        context_token_id: as of :func:`megatron_rmipo.plugin.batches.preference_batches`.
        tokens_per_microbatch: most tokens of a row; None: as many as come together.
        share_prompts: a prompt is computed once for both of its responses.
        seed, order: of the pairs, as of :func:`megatron_rmipo.plugin.batches.preference_batches`: ``permuted`` to go on with a
            run whose ``run_config.yaml`` has no ``order``.
        logprob_chunk_size: vocabulary entries whose logits exist at a time.
        attention_backend: of packed rows, as of :func:`megatron_rmipo.model.build.build_policy`.
    """

    objective: str = "rmipo"
    objective_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_path: list[str]
    valid_data_path: list[str] = dataclasses.field(default_factory=list)
    reference_cache: str | None = None
    context_token_id: int | Literal["bos"] | None = "bos"
    tokens_per_microbatch: int | None = None
    share_prompts: bool = True
    seed: int = 1234
    order: OrderName = NEW_ORDER
    logprob_chunk_size: int = 4096
    attention_backend: str = "auto"
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "external"
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.iterators: tuple[PreferenceBatches, HeldOutBatches | None] | None = None

    def build_datasets(self, context: DatasetBuildContext) -> tuple[PreferenceBatches, HeldOutBatches | None, None]:
        """What :class:`PreferenceFinetune` has opened, when the model and its checkpoint were there.

        Raises:
            ConfigError: it is not among the callbacks.
        """
        if self.iterators is None:
            raise ConfigError(
                "PreferenceData is opened by PreferenceFinetune, which is not among the callbacks: "
                "step = PreferenceFinetune(); finetune(config, step, callbacks=[step])."
            )
        return *self.iterators, None


class PreferenceFinetune(Callback):
    """What ``finetune`` takes: the forward step, and the callback that prepares it. The same object is given as both.

    Attributes:
        objective: what is trained; None before the model is there.
        step: the forward step; None before the model is there.
    """

    def __init__(self) -> None:
        self.objective: Objective | None = None
        self.step: PreferenceStep | None = None
        self._train: PreferenceBatches | None = None
        self._held_out: HeldOutBatches | None = None

    def __call__(
        self, data_iterator: Iterator[Microbatch], model: Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Any]:
        """Run the next micro-batch; what Megatron's schedules call.

        Raises:
            ConfigError: this object is not among the callbacks, or as of :class:`megatron_rmipo.plugin.step.PreferenceStep`.
        """
        if self.step is None:
            raise ConfigError("the forward step is not among the callbacks, too: finetune(config, step, callbacks=[step]).")
        return self.step(data_iterator, model, return_schedule_plan)

    def on_data_init_start(self, context: CallbackContext) -> None:
        """Attach the model, which has its weights, and open the data where the run goes on. All ranks call it together.

        Raises:
            ConfigError: what of the configuration or the model does not go together with preference pairs, by name.
            CheckpointError: the checkpoint lacks what the objective carries from step to step.
            DataError: what the data has not.
        """
        config, train_state = context.state.cfg, context.state.train_state
        data = config.dataset
        if not isinstance(data, PreferenceData):
            raise ConfigError(
                f"config.dataset is a {type(data).__name__}: call use_preferences(config, PreferenceData(data_path=[...]))."
            )
        self.objective = build_objective(data.objective, data.objective_options)
        problems = problems_of(config, self.objective)
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(f"this configuration does not go together with preference pairs:\n{listed}")
        (model,) = context.model
        attach_model(
            model,
            vocab_size=config.model.vocab_size,
            chunk_size=data.logprob_chunk_size,
            attention_backend=data.attention_backend,
        )
        groups = ProcessGroups.of_megatron()
        # A reference in memory is the model itself, its adapters off.
        reference = model if self.objective.needs.perturbation is not None else None
        self.step = PreferenceStep(self.objective, reference=reference, groups=groups)
        if train_state.step > 0 and self.step.state:
            path = _iteration_directory(config.checkpoint, train_state.step) / STATE_FILE
            self.step.state = on_first_rank(groups.world, partial(_read_state, path, self.objective))
        self._train, self._held_out = data.iterators = _open(config, self.objective, model, train_state, groups)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """What the objective must know of the batch that comes next."""
        self._before_step(context.model[0], self._train)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """What the objective carries on from the batch, if the optimizer took the step."""
        if self.step is not None and self.step.state:
            self.step.after_step(updated=not context.skipped_iter)

    def on_eval_step_start(self, context: CallbackContext) -> None:
        """As of :meth:`on_train_step_start`."""
        self._before_step(context.model[0], self._held_out)

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Write what the objective carries from step to step into the checkpoint. All ranks call it together."""
        if self.step is not None and self.step.state:
            directory = Path(context.state.cfg.checkpoint.save) / f"iter_{context.state.train_state.step:07d}"
            content = json.dumps(self.step.state_dict()) + "\n"
            on_first_rank(self.step.groups.world, partial(replace_file, directory / STATE_FILE, [content]))

    def _before_step(self, model: Module, batches: PreferenceBatches | HeldOutBatches | None) -> None:
        assert self.step is not None, "the model is attached before"
        assert batches is not None, "the data is opened before"
        self.step.before_step(model, batches.peek())


def use_preferences(config: Any, data: PreferenceData) -> Any:
    """Make a recipe's configuration one of preference optimization, by the settings that this needs and no others.

    Args:
        config: a ``ConfigContainer``, with its model and its parallel layout.
        data: becomes its ``dataset``.

    Returns:
        The same container.
    """
    model = transformer_of(config)
    config.dataset = data
    # The gradient is divided by the number of pairs of the global batch, not by micro-batches.
    model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    model.hidden_dropout = model.attention_dropout = 0.0
    model.cuda_graph_impl = "none"
    if model.pipeline_model_parallel_size > 1:
        # Rows differ in length; the passes read what a stage has sent on.
        model.variable_seq_lengths = True
        model.deallocate_pipeline_outputs = False
        if not model.num_moe_experts:
            # The default is refused with variable lengths, even in a model without experts.
            model.moe_token_dispatcher_type = "alltoall"
    return config


def _open(
    config: Any, objective: Objective, model: Module, train_state: Any, groups: ProcessGroups
) -> tuple[PreferenceBatches, HeldOutBatches | None]:
    """Batches for training, from where the run stands, and for evaluation."""
    data, train, validation = config.dataset, config.train, config.validation
    batches = partial(_batches, data, objective, transformer_of(config), groups)
    training = batches(
        _pairs_of(data.data_path, data, objective, model, groups),
        train.global_batch_size,
        train.micro_batch_size,
        total_pairs=train.train_samples or train.train_iters * train.global_batch_size,
        consumed_pairs=train_state.consumed_train_samples,
        num_workers=data.num_workers,
    )
    if not data.valid_data_path or not validation.eval_iters:
        return training, None
    held_out = _pairs_of(data.valid_data_path, data, objective, model, groups)
    size, mean = validation.eval_global_batch_size, validation.eval_micro_batch_size
    named = ("validation.eval_iters", "eval_global_batch_size", f"valid_data_path {' '.join(data.valid_data_path)}")
    wanted = pairs_of_evaluation(held_out, validation.eval_iters, size, named=named)
    return training, HeldOutBatches(partial(batches, held_out, size, mean, total_pairs=wanted))


def _batches(
    data: PreferenceData,
    objective: Objective,
    model: Any,
    groups: ProcessGroups,
    pairs: PairCollection,
    size: int,
    mean: int,
    **further: Any,
) -> PreferenceBatches:
    return preference_batches(
        pairs,
        objective,
        global_batch_size=size,
        num_microbatches=size // (mean * groups.dp_size),
        tokens_per_microbatch=data.tokens_per_microbatch,
        seed=data.seed,
        order=data.order,
        unconditional="pass",
        context_token_id=data.context_token_id,
        share_prompts=data.share_prompts,
        multiple_of=model.tensor_model_parallel_size if model.sequence_parallel else 1,
        groups=groups,
        **further,
    )


def _pairs_of(
    prefixes: list[str], data: PreferenceData, objective: Objective, model: Module, groups: ProcessGroups
) -> PairCollection:
    """Data sets with what the objective reads beside the pairs. All ranks call it together."""
    pairs = on_every_rank(groups.world, lambda: PairCollection([PairStore(prefix) for prefix in prefixes]))
    if objective.needs.mismatched:
        on_every_rank(groups.world, pairs.match_anew)
    reads = objective.needs.reference or objective.needs.mismatched
    cached = data.reference_cache is not None or on_first_rank(groups.world, partial(has_cached_scores, pairs))
    if reads and not cached and has_adapters(model):
        # Rows of two sequences of the longest that the model has positions for: each pair fits.
        tokens = data.tokens_per_microbatch or 2 * unwrapped(model).max_sequence_length
        score_reference(model, pairs, objective, tokens_per_microbatch=tokens, share_prompts=data.share_prompts, groups=groups)
    else:
        attach_cached_scores(pairs, objective, data.reference_cache, groups)
    return pairs


def _iteration_directory(checkpoint: Any, iteration: int) -> Path:
    """Where the checkpoint lies that the run goes on from; ``checkpoint.load`` may name an iteration itself."""
    load = Path(checkpoint.load)
    return load if load.name.startswith("iter_") else load / f"iter_{iteration:07d}"


def _read_state(path: Path, objective: Objective) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, state = content["objective"], dict(content["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: what objective {objective.name} carries from step to step cannot be read ({error}). Go on from another "
            "checkpoint, or begin anew with checkpoint.pretrained_checkpoint."
        ) from error
    if name != objective.name:
        raise CheckpointError(
            f"{path}: the run was begun with objective {name}, not with {objective.name}. Go on with that one, or begin anew "
            "with checkpoint.pretrained_checkpoint."
        )
    check_state(objective, state)
    return state
