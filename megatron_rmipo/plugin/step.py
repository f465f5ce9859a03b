"""The step of preference optimization in somebody else's training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.lora.switch import AdapterView
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.objectives.base import Objective, State
from megatron_rmipo.objectives.contract import check_objective, check_state
from megatron_rmipo.passes.pair_losses import KnownPairs, Prepared, RowLosses, row_losses
from megatron_rmipo.passes.row_problems import check_lengths, check_rows
from megatron_rmipo.passes.rows import on_device, row_output
from megatron_rmipo.passes.step_passes import PairMetrics, gather_pair_metrics, prepare_batch
from megatron_rmipo.plugin.batches import Microbatch
from megatron_rmipo.plugin.dataset import given_rows, read_of_whole_batch
from megatron_rmipo.plugin.loop_checks import check_auxiliary_losses, check_loop, refuse_different_batches
from megatron_rmipo.plugin.without_adapters import has_adapters, is_same_model
from megatron_rmipo.runtime.evaluation_mode import evaluating
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.transfers import to_device


class PreferenceStep:
    """``forward_step`` of a Megatron loop: a micro-batch through the model, and the loss of its pairs.

    What the loss function gives is (sum over pairs, number of pairs, report), so that with ``calculate_per_token_loss`` the
    gradient is the mean over the pairs of the global batch, however it is cut. Of a model with experts it counts tokens for
    pairs, with a sum as many times larger, so that auxiliary losses of routers are means, too. The report's values are
    ``[sum, number]`` tensors of pairs.

    What an objective must know of the whole batch before its losses, :meth:`before_step` finds out where the loop calls it before
    the schedule starts. Without such a call it is done in the step's first forward where there is one pipeline stage.

    Args:
        objective: what is trained.
        reference: of objectives that keep one in memory: an attached model on this rank, frozen, or its chunks. The model that is
            trained is one where it has adapters: what it is with them off.
        groups: the process groups of this rank; None: Megatron's.

    Attributes:
        objective, reference, groups: as given.
        state: what the objective carries from step to step; :meth:`state_dict` is what a checkpoint keeps of it.

    Raises:
        ConfigError: no objective, or a reference where it keeps none in memory, or none where it does.
    """

    def __init__(self, objective: Objective, *, reference: Chunks | None = None, groups: ProcessGroups | None = None) -> None:
        check_objective(objective)
        _check_reference(objective, reference)
        self.objective = objective
        self.reference = reference
        self.groups = groups or ProcessGroups.of_megatron()
        self.state: State = dict(objective.initial_state())
        self._current: RankBatch | None = None
        self._prepared = Prepared()
        self._known: KnownPairs | None = None
        self._tokens: Tensor | None = None  # of each pair of the batch, where the gradient is divided by tokens
        self._reports: list[RowLosses] = []
        self._seen: set[tuple[int, int]] = set()  # (chunk of the model, number of a row) of the current batch
        self._advances = False
        self._agreed = False  # that all ranks have the same batches

    def __call__(
        self, data_iterator: Iterator[Microbatch | Mapping[str, Any]], model: Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Any]:
        """Run the next micro-batch; what Megatron's schedules call.

        Micro-batches come from :func:`megatron_rmipo.plugin.batches.preference_batches`, or are dicts as
        :class:`megatron_rmipo.plugin.dataset.PreferenceCollator` makes them.

        Raises:
            ConfigError: the loop would not take the mean over pairs, the objective needs :meth:`before_step`, it reads what a
                dict does not tell, the data is at its end, or as of :meth:`before_step`.
        """
        if return_schedule_plan:
            raise ConfigError(
                "overlap_moe_expert_parallel_comm wants a schedule plan, which packed rows have none of; leave it out."
            )
        microbatch = _next(data_iterator)
        if isinstance(microbatch, Mapping):
            check_loop(model)
            check_auxiliary_losses(model)
            given, known = given_rows(microbatch, self.objective)
            check_rows(model, [given])
            rows = on_device(given)
            return row_output(model, rows), partial(self._loss, rows, known, [], None)
        place = (id(model), microbatch.number)
        # Run again, it is another step's: what was found out before that is not true of the weights any more.
        if microbatch.batch is not self._current or place in self._seen:
            check_loop(model)
            self._check_passes(microbatch.batch)
            self._begin(model, microbatch.batch, (self.groups.dp, self.groups.tp))
        self._seen.add(place)
        row = on_device(microbatch.row)
        reference = self._prepared.references[microbatch.number] if self._prepared.references else None
        assert self._known is not None
        return row_output(model, row, reference), partial(self._loss, row, self._known, self._reports, self._tokens)

    def before_step(self, model: Chunks, batch: RankBatch) -> None:
        """Find out what the objective must know of a batch before its losses. All ranks call it together, before the schedule.

        Args:
            model: as the schedule takes it, with interleaved pipelines the list of its chunks.
            batch: whose micro-batches come next: ``batches.peek()``.

        Raises:
            ConfigError: on every rank: their batches differ, or the loop has not run all micro-batches of the batch before. Or on
                this rank: the model cannot take its rows, or is its own reference and has no adapters.
        """
        self._begin(model, batch, (self.groups.dp, self.groups.mp))

    def _begin(self, model: Chunks, batch: RankBatch, meeting: Sequence[ProcessGroup]) -> None:
        """:meth:`before_step`, on all ranks of some groups."""
        self._refuse_left_over()
        check_rows(model, batch.rows, batch.lengths)
        if not self._agreed:
            refuse_different_batches(self.objective, batch, meeting)
            self._agreed = True
        if self._advances and self._seen and self.state:
            # The loop has not called after_step.
            self.after_step()
        with evaluating(model) as trains:
            check_lengths(model, batch.conditional, messages_of_megatron=trains)
            prepared = prepare_batch(model, batch, self.objective, self.state, self.groups, self._reference_beside(model))
        self._current, self._prepared, self._advances = batch, prepared, trains
        self._known, self._tokens = KnownPairs.of(batch, prepared), _tokens_of_pairs(model, batch)
        self._reports, self._seen = [], set()

    def _reference_beside(self, model: Chunks) -> Chunks | AdapterView | None:
        """The reference; the model itself is one with its adapters off."""
        if self.reference is None or not is_same_model(self.reference, model):
            return self.reference
        if not has_adapters(model):
            raise ConfigError(
                f"objective {self.objective.name}: the reference is the model that is trained, which has no adapters that could "
                "be off: they would never differ. Give PreferenceStep a second model with the reference's weights."
            )
        return AdapterView(self.reference, None)

    def after_step(self, *, updated: bool = True) -> PairMetrics:
        """Metrics of the batch that was run, and what the objective carries on from it. All ranks call it together.

        Args:
            updated: whether the optimizer took the step; the objective's state stays as it is if not.

        Raises:
            ConfigError: no batch was run since, or not all of its micro-batches.
        """
        if self._current is None or not self._seen:
            raise ConfigError(
                "step.after_step() is called after a schedule has run this step's micro-batches, once; none was run. Those that "
                "are dicts belong to no batch: their metrics are what the loss function reports."
            )
        self._refuse_left_over()
        metrics = gather_pair_metrics(self._reports, self._current.num_pairs, self._prepared, self.groups)
        if updated and self._advances:
            self.state = self.objective.advance(self.state, metrics.batch, metrics.values)
            check_state(self.objective, self.state)
        # Hidden states of a reference among it, which the next step's activations would stand beside.
        self._current, self._prepared, self._known = None, Prepared(), None
        self._reports, self._seen, self._advances = [], set(), False
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: the objective's name and its state, plain numbers, the same on every rank."""
        return {"objective": self.objective.name, "state": dict(self.state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ConfigError: it was another objective's, or holds something else than this one's state.
        """
        state, own = state_dict.get("state"), self.objective.initial_state()
        if state_dict.get("objective") != self.objective.name or not isinstance(state, Mapping) or set(state) != set(own):
            raise ConfigError(
                f"what is to be loaded, {dict(state_dict)!r:.200}, is no state of objective {self.objective.name}, which carries "
                f"{', '.join(own) or 'nothing'} from step to step. Go on with the objective that the checkpoint was written with."
            )
        check_state(self.objective, state)
        self.state, self._current, self._advances = dict(state), None, False

    def _refuse_left_over(self) -> None:
        """Refuse to go on from a batch of which the loop has run some micro-batches alone."""
        if self._current is None or not self._seen:
            return
        numbers: dict[int, set[int]] = {}
        for chunk, number in self._seen:
            numbers.setdefault(chunk, set()).add(number)
        run, all_of_them = min(map(len, numbers.values())), len(self._current.conditional)
        if run < all_of_them:
            raise ConfigError(
                f"the loop has run {run} of the {all_of_them} micro-batches of a global batch, and goes on to the next: "
                "gradients and metrics would be those of other pairs. Give Megatron's schedule as many num_microbatches as "
                "preference_batches was given, and an interleaved pipeline the iterators batches.chunks(n), made once."
            )

    def _check_passes(self, batch: RankBatch) -> None:
        """Refuse passes over several pipeline stages where a schedule runs already: later stages wait for their first input."""
        wanted = ["log p(y) from a pass of its own"] * bool(batch.unconditional) + read_of_whole_batch(self.objective)
        if wanted and self.groups.pp_size > 1:
            raise ConfigError(
                f"objective {self.objective.name} reads {', '.join(wanted)}, which takes all pipeline stages before the schedule "
                "starts. Call step.before_step(model, batches.peek()) then, each step."
            )

    def _loss(
        self, row: Row, known: KnownPairs, reports: list[RowLosses], tokens: Tensor | None, output: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        found = row_losses(row, output, objective=self.objective, known=known)
        reports.append(found.detached())
        total, count = found.sum_and_count()
        if tokens is not None:
            total = total * (tokens.sum() / tokens.numel())
            count = torch.where(found.numbers >= 0, tokens[found.numbers.clamp(min=0)], 0).sum().to(torch.int)
        return total, count, _report(found)


def _report(found: RowLosses) -> dict[str, Tensor]:
    """Name -> ``[sum, number]`` over the row's pairs that have such a value, fp32."""
    report = {}
    for name, values in found.values.items():
        counts = (found.numbers >= 0) & ~torch.isnan(values) if name != "loss" else found.numbers >= 0
        report[name] = torch.stack([torch.where(counts, values, 0.0).sum(), counts.sum().to(values.dtype)])
    return report


def _check_reference(objective: Objective, reference: Chunks | None) -> None:
    keeps = objective.needs.perturbation is not None
    if keeps and reference is None:
        raise ConfigError(
            f"objective {objective.name} mixes logits with those of a reference in memory: PreferenceStep(objective, "
            "reference=model), a second model with the reference's weights, attached and in the same layout of ranks; or the "
            "model that is trained, where it has adapters."
        )
    if reference is not None and not keeps:
        raise ConfigError(
            f"objective {objective.name} keeps no reference in memory, and would not read it: leave reference out. Log-probs of "
            "one come from megatron_rmipo.plugin.score_reference where it compares with any."
        )


def _next(data_iterator: Iterator[Any]) -> Any:
    try:
        return next(data_iterator)
    except StopIteration:
        # Ranks of later stages wait for this one's output by now: a loop cannot end well here.
        raise ConfigError(
            "the data is at its end, and the loop asks for another micro-batch. End the loop before: batches.peek() raises "
            "StopIteration on every rank when all pairs were seen. Or give preference_batches total_pairs, as many as the loop "
            "trains on."
        ) from None


def _tokens_of_pairs(model: Chunks, batch: RankBatch) -> Tensor | None:
    """Int64 ``[P]`` on the device: tokens of each pair, where the gradient has to be divided by them; None: by pairs.

    Megatron's routers multiply a row's auxiliary losses by its tokens, so that division by all tokens makes a mean of them. The
    sum over pairs is multiplied by the tokens of a mean pair, then, and its gradient stays what it is.
    """
    if not getattr(unwrapped(chunks_of(model)[0]).config, "num_moe_experts", None):
        return None
    return to_device(torch.from_numpy(batch.gradient_tokens))
