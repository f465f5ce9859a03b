"""What ``--by`` ranks two responses by: numbers of each response out of its log-probs.

Shape letter: P pairs of a set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation.figures import Floats
from megatron_rmipo.objectives.base import BatchLogps, Objective, State
from megatron_rmipo.objectives.contract import check_output, check_prepared
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps

# Name -> what it is, for help and tables.
CRITERIA: Mapping[str, str] = {
    "mean_logp": "log p(y|x) per token",
    "sum_logp": "log p(y|x)",
    "pmi_mean": "log p(y|x) per token less log p(y) per token",
    "pmi_sum": "log p(y|x) - log p(y)",
    "log_ratio": "log p(y|x) less that of the reference",
    "reward": "the objective's reward",
}
_NEED_RESPONSES_ALONE = {"pmi_mean", "pmi_sum"}
# Of losses and margins of fp32.
_SAME_LOSS = 1e-4


@dataclasses.dataclass(frozen=True)
class Sums:
    """Log-probs of both responses of P pairs under one model.

    Attributes:
        logps: fp32 ``[P, 2]``, summed over the scored tokens of (chosen, rejected).
        lengths: ``[P, 2]``, how many those are.
    """

    logps: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]

    def mean(self) -> Floats:
        """Per token, float64 ``[P, 2]``; 0 where none is scored."""
        means: Floats = self.logps.astype(np.float64) / np.maximum(self.lengths, 1)
        return means

    def as_pair_sums(self) -> PairSums:
        """As objectives are given them."""
        return PairSums(torch.from_numpy(self.logps), torch.from_numpy(self.lengths.astype(np.float32)))


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """What models say of a set's pairs.

    Attributes:
        policy: of the responses after their prompts.
        alone: of the responses alone, by the token before them (None for nothing).
        reference: fp32 ``[P, 2]``, sums under the reference; None without one.
        mismatched, ref_mismatched: fp32 ``[P, 2]``, sums of other rows' responses; None where the objective reads none.
        columns: numbers beside the pairs, fp32 ``[P]`` by name.
    """

    policy: Sums
    alone: Mapping[int | None, Sums]
    reference: npt.NDArray[np.float32] | None = None
    mismatched: npt.NDArray[np.float32] | None = None
    ref_mismatched: npt.NDArray[np.float32] | None = None
    columns: Mapping[str, npt.NDArray[np.float32]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an evaluation ranks by.

    Attributes:
        names: keys of :data:`CRITERIA`.
        objective: of ``reward``; None without it.
        state: what the objective carries.
    """

    names: tuple[str, ...]
    objective: Objective | None
    state: State = dataclasses.field(default_factory=dict)

    def contexts(self, context_token_id: int | None) -> list[int | None]:
        """The tokens (None for nothing) after which responses alone are scored, given the one that models of this kind have."""
        needed = {context_token_id} if _NEED_RESPONSES_ALONE & set(self.names) else set()
        unconditional = None if self.objective is None else self.objective.needs.unconditional
        if unconditional is not None:
            needed.add(context_token_id if unconditional == "bos" else None)
        return sorted(needed, key=lambda one: -1 if one is None else one)


def choose_criteria(asked: Sequence[str] | None, objective: Objective | None, *, has_reference: bool) -> tuple[str, ...]:
    """The criteria to rank by: those asked for, else all that the given models allow.

    Raises:
        ConfigError: one is not known, or needs a model or an objective that is not given; a reference or an objective is given
            that nothing reads; or the objective's reward cannot be had of log-probs that are kept.
    """
    if objective is not None and objective.needs.perturbation is not None:
        raise ConfigError(
            f"--objective {objective.name} mixes its reference's logits into the policy's, which an evaluation does not. Its "
            "rewards rank as --by log_ratio does."
        )
    if objective is not None and (lacking := _lacks("reward", objective, has_reference=has_reference)) is not None:
        raise ConfigError(f"--objective {objective.name} needs {lacking}.")
    possible = [name for name in CRITERIA if _lacks(name, objective, has_reference=has_reference) is None]
    if asked is None:
        return tuple(possible)
    for name in asked:
        if name not in CRITERIA:
            raise ConfigError(f"--by {name}: unknown; known: {', '.join(CRITERIA)}.")
        lacking = _lacks(name, objective, has_reference=has_reference)
        if lacking is not None:
            raise ConfigError(f"--by {name} needs {lacking}. Give it, or leave {name} out.")
    if objective is not None and "reward" not in asked:
        raise ConfigError(f"--objective {objective.name} does nothing with --by {' '.join(asked)}. Add reward, or leave it out.")
    read = "log_ratio" in asked or (objective is not None and (objective.needs.reference or objective.needs.mismatched))
    if has_reference and not read:
        raise ConfigError(f"the reference does nothing with --by {' '.join(asked)}. Add log_ratio, or leave the reference out.")
    return tuple(name for name in CRITERIA if name in asked)


def _lacks(name: str, objective: Objective | None, *, has_reference: bool) -> str | None:
    if name == "reward" and objective is None:
        return "--objective NAME"
    needs_reference = name == "log_ratio" or (
        name == "reward" and objective is not None and (objective.needs.reference or objective.needs.mismatched)
    )
    if needs_reference and not has_reference:
        return "a reference: --reference-hf DIR or --reference-load DIR"
    return None


def score_by(wanted: Wanted, scored: ScoredSet, context_token_id: int | None) -> tuple[dict[str, Floats], bool]:
    """The numbers of every criterion, and whether the objective's margins are logits.

    Args:
        wanted: the criteria.
        scored: of the set.
        context_token_id: the token before responses alone for PMI.

    Returns:
        Criterion -> float64 ``[P, 2]`` of (chosen, rejected); True where the objective's loss is ``-log sigmoid`` of the margin
        of its rewards on every pair, so that this sigmoid is a probability.

    Raises:
        ConfigError: the objective gives no rewards of both responses.
    """
    policy, found, are_logits = scored.policy, {}, False
    sums = policy.logps.astype(np.float64)
    for name in wanted.names:
        if name == "mean_logp":
            found[name] = policy.mean()
        elif name == "sum_logp":
            found[name] = sums
        elif name == "pmi_mean":
            alone = scored.alone[context_token_id]
            # What has no scored token alone tells nothing about its prompt.
            found[name] = np.where(alone.lengths > 0, policy.mean() - alone.mean(), 0.0)
        elif name == "pmi_sum":
            alone = scored.alone[context_token_id]
            found[name] = np.where(alone.lengths > 0, sums - alone.logps.astype(np.float64), 0.0)
        elif name == "log_ratio":
            assert scored.reference is not None
            found[name] = sums - scored.reference.astype(np.float64)
        else:
            found[name], are_logits = objective_rewards(wanted, scored, context_token_id)
    return found, are_logits


@torch.no_grad()
def objective_rewards(wanted: Wanted, scored: ScoredSet, context_token_id: int | None) -> tuple[Floats, bool]:
    """The rewards that an objective gives, as :func:`score_by`; all pairs are one batch.

    Raises:
        ConfigError: it gives none of both responses.
    """
    objective = wanted.objective
    assert objective is not None
    needs, num_pairs = objective.needs, len(scored.policy.logps)
    context = context_token_id if needs.unconditional == "bos" else None
    pairs = pair_logps(
        scored.policy.as_pair_sums(),
        mean_chosen_length=torch.tensor(float(scored.policy.lengths[:, 0].mean())),
        unconditional=scored.alone[context].as_pair_sums() if needs.unconditional is not None else None,
        reference=_tensor(scored.reference) if needs.reference else None,
        columns={name: torch.from_numpy(scored.columns[name]) for name in needs.columns},
    )
    batch = BatchLogps(
        pairs if needs.batch else None,
        _tensor(scored.mismatched),
        _tensor(scored.ref_mismatched),
        torch.ones(num_pairs, 2, dtype=torch.bool),
    )
    prepared = objective.prepare(batch, wanted.state)
    check_prepared(objective, prepared, num_pairs)
    output = objective(dataclasses.replace(pairs, batch={name: value.float() for name, value in prepared.items()}))
    check_output(objective, output, num_pairs)
    if not {"rewards/chosen", "rewards/rejected"} <= output.metrics.keys():
        raise ConfigError(f"--objective {objective.name} gives no rewards of two responses. Leave it out.")
    rewards = torch.stack([output.metrics["rewards/chosen"], output.metrics["rewards/rejected"]], dim=1).double()
    margins = rewards[:, 0] - rewards[:, 1]
    losses = torch.nn.functional.softplus(-margins)
    are_logits = bool(torch.allclose(output.losses.double(), losses, rtol=_SAME_LOSS, atol=_SAME_LOSS))
    return rewards.numpy(), are_logits


def _tensor(table: npt.NDArray[np.float32] | None) -> torch.Tensor | None:
    return None if table is None else torch.from_numpy(table)
