"""Our objectives as slime's custom loss, as of its commit 624b824 (2026-08-21): ``--loss-type custom_loss``.

A pair is samples of one rollout id that stand together: prompt with chosen, prompt with rejected response, and where the
objective needs log p(y) each response alone, which the same forward pass scores; no gradient flows through those.

Shape letters: T tokens of a micro-batch, N scored tokens, V vocabulary, P pairs, tp tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.model.logprobs import vocab_parallel_logprobs
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.plugin.response_rows import pair_losses, refuse_needs

_ONE_BATCH = "slime calls its loss for one micro-batch, with nothing before the step"
_NOT_GIVEN = {
    "batch": _ONE_BATCH,
    "mismatched": _ONE_BATCH,
    "perturbation": "slime swaps its reference and its policy in and out of one model",
    "columns": "slime hands its loss no numbers beside the samples",
}
# Flag -> the one value under which samples are scored, and losses added up, as here.
_FLAGS = {"calculate_per_token_loss": False, "context_parallel_size": 1, "rollout_temperature": 1.0, "rollout_top_p": 1.0}


class ObjectiveLoss:
    """What ``--custom-loss-function-path`` names: the sum of an objective's losses over the pairs of a micro-batch.

    slime divides it by the rollout ids of the step, which are its pairs.

    Args:
        objective: what is trained.
        tensor_parallel_group: gives the group that shares the vocabulary: ``mpu.get_tensor_model_parallel_group``.
        vocab_size: real vocabulary size, where columns of padding shall not count; in slime's own log-probs, which those of the
            reference are, they do.

    Raises:
        ConfigError: slime cannot give what the objective needs.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        tensor_parallel_group: Callable[[], dist.ProcessGroup | None],
        vocab_size: int | None = None,
    ) -> None:
        refuse_needs(objective, "slime", _NOT_GIVEN)
        _refuse_token_means(objective)
        self.objective = objective
        self._group = tensor_parallel_group
        self._vocab_size = vocab_size

    def __call__(
        self, args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a micro-batch, as sums over its pairs. All ranks of the tensor-parallel group call it together.

        Args:
            args: slime's flags.
            batch: of a micro-batch, a list by sample: ``unconcat_tokens`` (prompt and response), ``total_lengths``,
                ``response_lengths``, ``loss_masks``, ``ref_log_probs``.
            logits: ``[1, T, V / tp]``, the samples one after the other.
            sum_of_sample_mean: not read; a mean over tokens is the objective's business.

        Raises:
            ConfigError: a flag has samples scored otherwise, or there is no reference.
            DataError: the samples do not come in pairs.
        """
        self._check_flags(args)
        needs = self.objective.needs
        each = samples_per_pair(self.objective)
        tokens, lengths = batch["unconcat_tokens"], batch["response_lengths"]
        _check_samples(tokens, lengths, each)
        source, target, sizes = _scored(tokens, lengths, batch["loss_masks"])
        logprobs = vocab_parallel_logprobs(logits[0][source], target, self._group(), vocab_size=self._vocab_size)
        scores = _scores(logprobs, sizes, each)
        counts = (scores.lengths[:, :2] > 0).all(dim=1)
        logps = pair_logps(
            scores[counts, :2],
            # Not known here; no loss that reads it gets so far.
            mean_chosen_length=logprobs.new_ones(()),
            reference=self._reference(batch, each)[counts] if needs.reference else None,
            unconditional=scores[counts, 2:] if needs.unconditional is not None else None,
        )
        output = pair_losses(self.objective, logps)
        metrics = {name: values.sum() for name, values in output.metrics.items() if name != "nll/chosen"}
        # Where no pair counts, a gradient still goes through the model.
        loss = output.losses.sum() + 0.0 * logprobs.sum()
        return loss, {"loss": loss.detach(), **metrics}

    def _check_flags(self, args: Any) -> None:
        for name, value in _FLAGS.items():
            found = getattr(args, name, value)
            if found != value:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {found}: objective {self.objective.name} is scored and summed up with {value} "
                    "alone"
                )

    def _reference(self, batch: Mapping[str, Any], each: int) -> Tensor:
        """Sums under the reference, ``[P, 2]``."""
        if batch.get("ref_log_probs") is None:
            raise ConfigError(
                f"objective {self.objective.name} needs log-probs under a reference, and the batch has no ref_log_probs: give "
                "--ref-load and --use-kl-loss, and leave --disable-compute-advantages-and-returns out"
            )
        kept = [one[mask.bool()] for one, mask in zip(batch["ref_log_probs"], batch["loss_masks"], strict=True)]
        return _scores(torch.cat(kept), [one.numel() for one in kept], each).logps[:, :2]


def _refuse_token_means(objective: Objective) -> None:
    """Refuse a loss that depends on the mean length of the global batch's chosen responses, which nobody tells slime's losses."""
    logps = PairSums(torch.tensor([[-2.0, -3.0], [-4.0, -1.0]]), torch.full((2, 2), 3.0))
    mean_length = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        output = objective(pair_logps(logps, mean_chosen_length=mean_length, unconditional=logps, reference=logps.logps))
    if output.losses.requires_grad:
        raise ConfigError(
            f"objective {objective.name} in slime: its loss has a mean over the chosen tokens of the global batch; {_ONE_BATCH}; "
            "take an objective, or a weight of that mean, without it"
        )


@dataclasses.dataclass(frozen=True)
class PairSample:
    """What a slime ``Sample`` is told: ``Sample(tokens=..., response_length=..., loss_mask=..., rollout_id=NUMBER_OF_PAIR)``."""

    tokens: list[int]
    response_length: int

    @property
    def loss_mask(self) -> list[int]:
        """All tokens of the response count."""
        return [1] * self.response_length


def samples_per_pair(objective: Objective) -> int:
    """How many samples stand together for a pair; ``--micro-batch-size`` is a multiple of it."""
    return 2 if objective.needs.unconditional is None else 4


def samples_of_pair(pair: TokenizedPair, objective: Objective, *, context_token_id: int | None) -> list[PairSample]:
    """The samples of a pair, in their order.

    Args:
        pair: its tokens.
        objective: what is trained.
        context_token_id: what stands before a response in log p(y); None for nothing, its first token not scored.

    Raises:
        DataError: a response of one token has no token to score without a context.
    """
    responses = [pair.chosen.tolist(), pair.rejected.tolist()]
    samples = [PairSample(pair.prompt.tolist() + response, len(response)) for response in responses]
    needs = objective.needs
    if needs.unconditional is None:
        return samples
    if context_token_id is not None and needs.unconditional == "bos":
        return samples + [PairSample([context_token_id, *response], len(response)) for response in responses]
    if min(map(len, responses)) < 2:
        raise DataError("a response of one token, alone, has none that is scored, which slime cannot take: leave such pairs out")
    return samples + [PairSample(response, len(response) - 1) for response in responses]


def _check_samples(tokens: Sequence[Tensor], lengths: Sequence[int], each: int) -> None:
    """Samples of pairs stand together, in their order."""
    hint = (
        f"each pair is {each} samples that stand together (samples_of_pair): set --micro-batch-size to a multiple of {each}, and "
        "leave --use-dynamic-batch-size out"
    )
    if len(tokens) % each:
        raise DataError(f"a micro-batch of {len(tokens)} samples; {hint}")
    samples = [(one[: len(one) - size], one[len(one) - size :]) for one, size in zip(tokens, lengths, strict=True)]
    for start in range(0, len(samples), each):
        group = samples[start : start + each]
        fits = torch.equal(group[0][0], group[1][0])
        for (_, response), (_, alone) in zip(group[:2], group[2:], strict=False):
            fits = fits and torch.equal(response[len(response) - len(alone) :], alone) and len(response) - len(alone) in (0, 1)
        if not fits:
            raise DataError(f"samples {start} to {start + each - 1} of a micro-batch are not those of one pair; {hint}")


def _scored(tokens: Sequence[Tensor], lengths: Sequence[int], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Places ``[N]`` of the logits that predict scored tokens, those tokens ``[N]``, and how many are each sample's."""
    source, target, end = [], [], 0
    for one, size, mask in zip(tokens, lengths, masks, strict=True):
        end += len(one)
        kept = mask.bool()
        source.append(torch.arange(end - size - 1, end - 1, device=one.device)[kept])
        target.append(one[len(one) - size :][kept])
    return torch.cat(source), torch.cat(target), [one.numel() for one in target]


def _scores(logprobs: Tensor, sizes: Sequence[int], each: int) -> PairSums:
    """Sums and numbers of tokens, ``[P, each]``, of pairs of so many samples, from those of all scored tokens ``[N]``."""
    parts = torch.split(logprobs, list(sizes))
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).to(torch.float32)
    return PairSums(sums.view(-1, each), torch.tensor(sizes, dtype=torch.float32, device=logprobs.device).view(-1, each))
