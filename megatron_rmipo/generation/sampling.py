"""How answers are sampled: temperatures, lengths and seeds."""

from __future__ import annotations

import dataclasses
import hashlib

from megatron_rmipo.generation.questions import Question

# The paper's, for AlpacaEval 2 (appendix C).
PRESETS = {"mistral-base": 0.7, "mistral-instruct": 0.5, "llama3": 0.9}
# Those of FastChat's llm_judge, by category of MT-Bench; the paper uses them, too.
MT_BENCH_TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
MT_BENCH_OTHER = 0.7
# As the settings of AlpacaEval's and Arena-Hard's users, and FastChat, have it.
MAX_TOKENS = {"alpaca_eval": 4096, "mt_bench": 1024, "arena_hard": 4096, "arena_hard_v2": 4096, "jsonl": 1024}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        temperature: 0 takes the most probable token; None goes by MT-Bench's categories.
        top_p: smallest set of tokens of at least this probability.
        max_tokens: of an answer.
        seed: of all answers; each has one of its own that is derived from it.
    """

    temperature: float | None
    top_p: float
    max_tokens: int
    seed: int

    def temperature_of(self, question: Question) -> float:
        """That of the answers to a question."""
        if self.temperature is not None:
            return self.temperature
        return MT_BENCH_TEMPERATURES.get(question.category, MT_BENCH_OTHER)

    def seed_of(self, question: Question, turn: int) -> int:
        """That of one answer: it depends on the question and not on what else is answered beside it."""
        digest = hashlib.sha256(f"{self.seed} {turn} {question.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1
