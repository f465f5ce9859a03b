"""Over how many ranks each part of a model and of a row is spread."""

from __future__ import annotations

import dataclasses

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture, padded_vocab_size
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.targets import modules_to_save
from megatron_rmipo.families.tensors import megatron_shape
from megatron_rmipo.model.problems.experts import expert_tensor_size

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Shares:
    """Sizes of groups, and what a rank has of what they share.

    Attributes:
        tensor: ranks that share a layer.
        context: that share a row along its tokens.
        sequence: that share hidden states along the tokens of one of those: ``tensor`` under sequence parallelism, else 1.
        expert_tensor: that share an expert.
        experts: over which the experts of a layer are spread.
        queries: channels of a rank's query heads.
        keys: of its key (or value) heads; a rank has one at least.
        vocabulary: rows of its part of the vocabulary, padding included.
        element_bytes: of a number in the dtype that is computed in.
    """

    tensor: int
    context: int
    sequence: int
    expert_tensor: int
    experts: int
    queries: float
    keys: float
    vocabulary: int
    element_bytes: int

    @classmethod
    def of(cls, arch: ModelArchitecture, config: Config) -> Shares:
        """Those of a model with some flags."""
        parallel = config.parallel
        tensor = parallel.tensor_model_parallel_size
        return cls(
            tensor=tensor,
            context=parallel.context_parallel_size,
            sequence=tensor if parallel.sequence_parallel else 1,
            expert_tensor=expert_tensor_size(parallel),
            experts=parallel.expert_model_parallel_size * expert_tensor_size(parallel),
            queries=arch.query_size / tensor,
            keys=max(arch.key_size / tensor, arch.kv_channels),
            vocabulary=padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by, tensor) // tensor,
            element_bytes=2 if config.model.bf16 else FP32_BYTES,
        )

    def matrix(self, arch: ModelArchitecture, rule: Rule) -> tuple[float, float]:
        """Rows and columns that a rank has of a matrix."""
        rows, columns = megatron_shape(rule, arch)
        ranks = self.expert_tensor if rule.per_expert else self.tensor
        if not rule.is_cut:
            return rows, columns
        return (rows, columns / ranks) if rule.cuts_columns else (rows / ranks, columns)


def trains_table(arch: ModelArchitecture, config: Config, megatron: str) -> bool:
    """Whether a run changes the embedding, or the output layer, which the name is Megatron's of."""
    return not config.lora.is_on or any(rule.megatron == megatron for rule, _ in modules_to_save(arch, config.lora))


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that read different pairs."""
    parallel = config.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return max(1, world_size // (model * parallel.context_parallel_size))
